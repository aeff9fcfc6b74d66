//! Calls that combine what the others do one at a time: buffers of several kinds in one call, calls that are under way at
//! once, and calls over bytes that the program keeps pinned.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use pinfold::{AlignedBuf, Errno, IoOptions, MapAccess};
use pinfold_mem::IovCursor;

use super::machine::{Machine, Outcome, PAGE, said, same};
use super::program::{Op, SIZE_MAX, Verb};

/// Pages of one submitted call at most, and of one pin.
const PAGES_MAX: u64 = 8;

/// A buffer that lives in somebody's mapping, which outlasts the call.
struct MappedBuf(*mut u8, usize);

// SAFETY: memory that anybody may change; the call makes raw copies.
unsafe impl Send for MappedBuf {}

impl AsMut<[u8]> for MappedBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped until the call has been waited for.
        unsafe { std::slice::from_raw_parts_mut(self.0, self.1) }
    }
}

fn apart(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.end <= b.start || b.end <= a.start
}

fn pages(at: u64, len: u64) -> Range<u64> {
    let start = at / PAGE * PAGE;
    start..start + (len / PAGE).min(PAGES_MAX) * PAGE
}

impl Machine {
    pub fn mixed_step(&mut self, op: Op, tag: usize) -> Outcome {
        match op.verb {
            Verb::WriteMixed => self.write_mixed(op, tag),
            Verb::ReadMixed => self.read_mixed(op),
            Verb::WriteNowait => self.write_how(op, tag, true),
            Verb::WriteDurable => self.write_how(op, tag, false),
            Verb::ReadNowait => self.read_nowait(op),
            Verb::Submit => self.submit(op, tag, false),
            Verb::SubmitMapped => self.submit(op, tag, true),
            Verb::WhilePinned => self.while_pinned(op, tag),
            _ => unreachable!("the machine's own, or a mapping's"),
        }
    }

    /// Returns a piece of the shared mapping that has nothing to do with `bytes`.
    fn mapped_apart(
        &mut self,
        bytes: &Range<u64>,
        len: u64,
    ) -> Result<(*mut u8, Range<u64>), String> {
        let from = (bytes.end + len).next_multiple_of(PAGE) % SIZE_MAX;
        let (map, part) = self.part(MapAccess::Write, &(from..from + len))?;
        let part = if apart(&part, bytes) {
            part
        } else {
            part.start..part.start
        };
        Ok((map.addr(part.start), part))
    }

    /// Writes from plain memory, a mapping of this file and one of another, in one call.
    fn write_mixed(&mut self, op: Op, tag: usize) -> Outcome {
        let third = op.len / 3;
        let plain = Self::pattern(op.at, third, tag);
        let target = op.at..op.at + op.len;
        let (mapped, part) = self.mapped_apart(&target, third)?;
        let other = 0..third.min(self.other.len() as u64);
        let theirs = self.other_map()?.as_mut_ptr();
        // SAFETY: mapped; the call makes raw copies.
        let mapped =
            unsafe { std::slice::from_raw_parts(mapped, (part.end - part.start) as usize) };
        // SAFETY: as above.
        let theirs = unsafe { std::slice::from_raw_parts(theirs, other.end as usize) };
        let bufs = [
            IoSlice::new(&plain),
            IoSlice::new(mapped),
            IoSlice::new(theirs),
        ];
        let wrote = self.files().buffered.write_vectored_at(&bufs, op.at);
        let wrote = said("write from mixed buffers", wrote)?;
        let mut source = plain.clone();
        source.extend_from_slice(self.expected(part.start, part.end - part.start));
        source.extend_from_slice(&self.other[..other.end as usize]);
        same("bytes written from mixed buffers", wrote, source.len())?;
        self.note(op.at, &source);
        Ok(())
    }

    /// Reads into the same kinds of memory.
    fn read_mixed(&mut self, op: Op) -> Outcome {
        let third = op.len / 3;
        let mut plain = vec![0xa5; third as usize];
        let source = op.at..op.at + op.len;
        let (mapped, part) = self.mapped_apart(&source, third)?;
        let other = 0..third.min(self.other.len() as u64);
        let theirs = self.other_map()?.as_mut_ptr();
        // SAFETY: mapped for stores; the call makes raw copies.
        let mapped =
            unsafe { std::slice::from_raw_parts_mut(mapped, (part.end - part.start) as usize) };
        // SAFETY: as above.
        let theirs = unsafe { std::slice::from_raw_parts_mut(theirs, other.end as usize) };
        let room = [plain.len(), mapped.len(), theirs.len()];
        let mut bufs = [
            IoSliceMut::new(&mut plain),
            IoSliceMut::new(mapped),
            IoSliceMut::new(theirs),
        ];
        let got = self.files().buffered.read_vectored_at(&mut bufs, op.at);
        let got = said("read into mixed buffers", got)?;
        let want = self
            .expected(op.at, room.iter().sum::<usize>() as u64)
            .to_vec();
        same("bytes read into mixed buffers", got, want.len())?;
        let (first, rest) = want.split_at(room[0].min(got));
        let (second, third) = rest.split_at(room[1].min(rest.len()));
        self.compare(
            "read into the first of mixed buffers",
            op.at,
            &plain[..first.len()],
            first.len() as u64,
        )?;
        self.note(part.start, second);
        self.other[..third.len()].copy_from_slice(third);
        Ok(())
    }

    /// Writes without waiting, or durably.
    fn write_how(&mut self, op: Op, tag: usize, nowait: bool) -> Outcome {
        let source = Self::pattern(op.at, op.len, tag);
        let how = IoOptions {
            nowait,
            dsync: !nowait,
            ..IoOptions::default()
        };
        let mut cursor = IovCursor::from_slice(&source);
        let progress = self.files().buffered.write_cursor(&mut cursor, op.at, &how);
        let done = progress.done as usize;
        match progress.stop {
            None => same("bytes of a write", done, source.len())?,
            Some(error) if nowait && error.errno() == Errno::EAGAIN => {}
            Some(error) => return Err(format!("write (nowait {nowait}): {error:?}")),
        }
        self.note(op.at, &source[..done]);
        if nowait {
            return Ok(());
        }
        self.check_stored_part(op.at..op.at + op.len)
    }

    fn read_nowait(&mut self, op: Op) -> Outcome {
        let mut target = vec![0xa5; op.len as usize];
        let how = IoOptions {
            nowait: true,
            ..IoOptions::default()
        };
        let mut cursor = IovCursor::from_mut_slice(&mut target);
        let progress = self.files().buffered.read_cursor(&mut cursor, op.at, &how);
        let done = progress.done;
        let stop = progress.stop.map(|error| error.errno());
        same(
            "an error but EAGAIN",
            stop.filter(|&errno| errno != Errno::EAGAIN),
            None,
        )?;
        let want = self.expected(op.at, op.len).len() as u64;
        same(
            "a read that ended early said so",
            stop.is_some(),
            done < want,
        )?;
        self.compare(
            "read without waiting",
            op.at,
            &target[..done as usize],
            done,
        )
    }

    /// A direct write and a direct read of other pages under way at once, with plain memory or mappings as buffers, and
    /// calls and loads of third pages meanwhile.
    fn submit(&mut self, op: Op, tag: usize, mapped: bool) -> Outcome {
        let size = self.bytes.len() as u64;
        let to = pages(op.at, op.len);
        let from = pages((to.end + op.len) % SIZE_MAX, op.len);
        let third = pages((from.end + PAGE) % SIZE_MAX, op.len);
        let len = to.end - to.start;
        if len == 0 || to.end > SIZE_MAX || !apart(&to, &from) {
            return Ok(());
        }
        let want = from.start.min(size)..from.end.min(size);
        // What is read comes into a mapping of the other file, behind what is written from it.
        let room = self.other.len() as u64;
        if 2 * len > room {
            return Ok(());
        }
        let direct = std::sync::Arc::clone(&self.files().direct);
        let theirs = self.other_map()?.as_mut_ptr();
        let source = if mapped {
            self.other[..len as usize].to_vec()
        } else {
            Self::pattern(to.start, len, tag)
        };
        let mut plain = AlignedBuf::zeroed(len as usize);
        plain.as_mut_slice()[..len as usize].copy_from_slice(&source);
        let (mut wrote, mut read) = (None, None);
        let (mut wrote_mapped, mut read_mapped) = (None, None);
        if mapped {
            let into = MappedBuf(theirs.wrapping_add(len as usize), len as usize);
            wrote_mapped = Some(said(
                "submit",
                direct.submit_write(MappedBuf(theirs, len as usize), to.start),
            )?);
            read_mapped = Some(said("submit", direct.submit_read(into, from.start))?);
        } else {
            wrote = Some(said("submit", direct.submit_write(plain, to.start))?);
            read = Some(said(
                "submit",
                direct.submit_read(AlignedBuf::zeroed(len as usize), from.start),
            )?);
        }
        // Nothing is returned before both have been waited for.
        let meanwhile = self.meanwhile(&to, &third, tag);
        let (wrote, got, bytes) = match (wrote, read, wrote_mapped, read_mapped) {
            (Some(wrote), Some(read), ..) => {
                let (wrote, mut read) = (wrote.wait(), read.wait());
                let done = said("submitted read", read.progress.posix())?;
                let bytes = read.buf.as_mut_slice()[..done as usize].to_vec();
                (
                    said("submitted write", wrote.progress.posix())?,
                    done,
                    bytes,
                )
            }
            (_, _, Some(wrote), Some(read)) => {
                let (wrote, mut read) = (wrote.wait(), read.wait());
                let done = said("submitted read", read.progress.posix())?;
                let bytes = read.buf.as_mut()[..done as usize].to_vec();
                // The rest of the last block may have been overwritten.
                let into = len as usize..2 * len as usize;
                self.other[into].copy_from_slice(&read.buf.as_mut()[..len as usize]);
                (
                    said("submitted write", wrote.progress.posix())?,
                    done,
                    bytes,
                )
            }
            _ => unreachable!("one of the two pairs was submitted"),
        };
        meanwhile?;
        same("bytes of a submitted write", wrote, len)?;
        // A write that grows the file may come before the read or after it.
        let grown = to.end.max(size);
        let most = from.start.min(grown)..from.end.min(grown);
        let known = got >= want.end - want.start && got <= most.end - most.start;
        same(
            "the length of a submitted read is that before or after the write",
            known,
            true,
        )?;
        self.note(to.start, &source);
        self.compare("submitted read", from.start, &bytes, got)
    }

    /// What goes on beside a submitted write of `to`: none of it touches those bytes, or the size.
    fn meanwhile(&self, to: &Range<u64>, bytes: &Range<u64>, tag: usize) -> Outcome {
        let files = self.files();
        match tag % 4 {
            0 => said("sync_data", files.buffered.sync_data())?,
            1 => said("drop_cache", files.buffered.drop_cache())?,
            2 => said("write_back", files.buffered.write_back(to.clone()))?,
            _ => {}
        }
        let there = self.expected(bytes.start, bytes.end - bytes.start).len() as u64;
        if !apart(to, bytes) || there == 0 {
            return Ok(());
        }
        let mut got = vec![0; there as usize];
        let read = said("read_at", files.buffered.read_at(&mut got, bytes.start))?;
        self.compare(
            "read beside submitted calls",
            bytes.start,
            &got[..read],
            there,
        )
    }

    /// Keeps bytes of the mapping pinned while calls of every kind go over them.
    fn while_pinned(&mut self, op: Op, tag: usize) -> Outcome {
        let most = (self.pages / 4).saturating_sub(1).min(PAGES_MAX) * PAGE;
        let whole = op.at / PAGE * PAGE..(op.at + op.len).min(op.at / PAGE * PAGE + most);
        let (_, part) = self.part(MapAccess::Write, &whole)?;
        let full = part.start..part.end / PAGE * PAGE;
        if full.is_empty() || part.start % PAGE != 0 {
            return Ok(());
        }
        let map = self.maps.take_shared().expect("`part` made one");
        let outcome = (|| {
            let at = map.at(full.start);
            let pinned = map.mapping.pin(at..map.at(full.end), true);
            let pinned = said("pin", pinned)?;
            let outcome = self.over_pinned(map.addr(full.start), &full, tag);
            drop(pinned);
            outcome
        })();
        self.maps.put_shared(map);
        outcome?;
        let back = self.expected(full.start, full.end - full.start).to_vec();
        let (map, again) = self.part(MapAccess::Write, &full)?;
        same("what was pinned is mapped", &again, &full)?;
        same("what was pinned", map.load(&full) == back, true)
    }

    fn over_pinned(&mut self, addr: *mut u8, bytes: &Range<u64>, tag: usize) -> Outcome {
        let len = bytes.end - bytes.start;
        let source = Self::pattern(bytes.start, len, tag);
        let (direct, buffered) = {
            let files = self.files();
            (
                std::sync::Arc::clone(&files.direct),
                std::sync::Arc::clone(&files.buffered),
            )
        };
        match tag % 5 {
            0 => {
                let mut plain = AlignedBuf::zeroed(len as usize);
                plain.as_mut_slice()[..len as usize].copy_from_slice(&source);
                let wrote = direct.write_at(&plain.as_mut_slice()[..len as usize], bytes.start);
                same(
                    "bytes written over pinned ones",
                    said("direct write", wrote)? as u64,
                    len,
                )?;
                self.note(bytes.start, &source);
                self.check_stored_part(bytes.clone())?;
            }
            1 => {
                let wrote = said("write_at", buffered.write_at(&source, bytes.start))?;
                same("bytes written over pinned ones", wrote as u64, len)?;
                self.note(bytes.start, &source);
            }
            2 => {
                // SAFETY: pinned for stores.
                unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), addr, source.len()) };
                self.note(bytes.start, &source);
                said("sync_all", buffered.sync_all())?;
                self.check_stored_part(bytes.clone())?;
            }
            3 => said("drop_cache", buffered.drop_cache())?,
            _ => {
                // SAFETY: pinned for stores; the call makes raw copies.
                let into = unsafe { std::slice::from_raw_parts_mut(addr, len as usize) };
                let got = said("direct read", direct.read_at(into, bytes.start))?;
                same("bytes read into themselves", got as u64, len)?;
            }
        }
        // A system call on them, which a fault would end.
        let file = tempfile::tempfile().map_err(|error| error.to_string())?;
        // SAFETY: a plain system call on memory that is there.
        let put = unsafe { libc::pwrite(file.as_raw_fd(), addr.cast(), len as usize, 0) };
        same("bytes the system loaded", put, len as isize)?;
        let mut loaded = vec![0; len as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut loaded, 0)
            .map_err(|error| error.to_string())?;
        self.compare("pinned, as the system sees it", bytes.start, &loaded, len)
    }
}
