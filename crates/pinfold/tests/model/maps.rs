//! Mappings of the file: what loads must see, and where stores must go.
//!
//! Bytes of a page past the end of the file are nobody's: they may be stored to and say nothing, until the file grows
//! over them and they are zeros. What a private mapping has copied is its own until it is dropped, or the file is cut off
//! before it; where the file is shifted both the copy and the file's bytes are right.

use std::ops::Range;
use std::os::fd::AsRawFd as _;

use pinfold::{Advice, Errno, File, MapAccess, MapOptions, Mapping, Tracking};

use super::machine::{Machine, Outcome, PAGE, said, same};
use super::program::{Op, SIZE_MAX, Verb};

/// One mapping, and which pages of the file it shows.
pub struct Map {
    pub mapping: Mapping,
    /// The node that made it.
    pub node: usize,
    first: u64,
    live: Vec<bool>,
}

/// The three mappings that a program works with, made when they are first needed.
#[derive(Default)]
pub struct Maps {
    shared: Option<Map>,
    read: Option<Map>,
    private: Option<Map>,
    other: Option<Mapping>,
    /// Of each page, the bytes that the private mapping has made its own; `None` where nothing is promised.
    copies: Vec<Option<Vec<Option<u8>>>>,
}

impl Maps {
    /// Takes the mapping for stores out, to work on everything else beside it.
    pub fn take_shared(&mut self) -> Option<Map> {
        self.shared.take()
    }

    /// Returns the node whose mapping for stores there is.
    pub fn node(&self) -> Option<usize> {
        self.shared.as_ref().map(|map| map.node)
    }

    pub fn put_shared(&mut self, map: Map) {
        self.shared = Some(map);
    }

    /// Notes that the file was cut off at `end`: copies of what lies beyond are gone.
    pub fn cut_copies(&mut self, end: u64) {
        if !end.is_multiple_of(PAGE) {
            let last = self.copies.get_mut((end / PAGE) as usize);
            if let Some(Some(copy)) = last {
                // It may show what the page held before or zeros, if the kernel made it.
                copy.fill(None);
            }
        }
        for copy in self.copies.iter_mut().skip(end.div_ceil(PAGE) as usize) {
            *copy = None;
        }
    }

    /// Notes that the file was shifted from `from` on: a copy of what was there may have gone or not.
    pub fn forget_copies(&mut self, from: u64) {
        let first = (from / PAGE) as usize;
        for copy in self.copies.iter_mut().skip(first) {
            // Whether or not the page had been copied: the kernel may have done that by itself.
            *copy = Some(vec![None; PAGE as usize]);
        }
    }
}

impl Map {
    fn pages(&self) -> Range<u64> {
        self.first..self.first + self.live.len() as u64
    }

    /// Returns the first piece of `bytes` that is mapped throughout.
    fn mapped(&self, bytes: Range<u64>) -> Range<u64> {
        let shown = self.mapping.file_range();
        let bytes = bytes.start..bytes.end.min(shown.end);
        let is_live = |page: u64| {
            let index = page.checked_sub(self.first);
            index.is_some_and(|index| self.live.get(index as usize) == Some(&true))
        };
        let mut start = bytes.start;
        while start < bytes.end && !is_live(start / PAGE) {
            start = (start / PAGE + 1) * PAGE;
        }
        let mut end = start;
        while end < bytes.end && is_live(end / PAGE) {
            end = (end / PAGE + 1) * PAGE;
        }
        if start >= bytes.end {
            // Nothing, at a place that has an address.
            return self.first * PAGE..self.first * PAGE;
        }
        start..end.min(bytes.end)
    }

    pub fn at(&self, byte: u64) -> usize {
        (byte - self.first * PAGE) as usize
    }

    pub fn addr(&self, byte: u64) -> *mut u8 {
        self.mapping.as_mut_ptr().wrapping_add(self.at(byte))
    }

    /// Loads bytes as a program does.
    pub fn load(&self, bytes: &Range<u64>) -> Vec<u8> {
        let mut target = vec![0; (bytes.end - bytes.start) as usize];
        // SAFETY: `mapped` gave the range; `target` is as long.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.addr(bytes.start),
                target.as_mut_ptr(),
                target.len(),
            );
        }
        target
    }

    /// Stores bytes as a program does.
    fn store(&self, at: u64, source: &[u8]) {
        // SAFETY: `mapped` gave the range.
        unsafe {
            std::ptr::copy_nonoverlapping(source.as_ptr(), self.addr(at), source.len());
        }
    }

    /// The bytes as a buffer of a call, which copies them as raw memory.
    fn buffer(&self, bytes: &Range<u64>) -> &[u8] {
        // SAFETY: `mapped` gave the range.
        unsafe { slice(self.addr(bytes.start), bytes) }
    }

    /// The bytes as a target of a call.
    #[expect(clippy::mut_from_ref, reason = "memory that anybody may change")]
    fn target(&self, bytes: &Range<u64>) -> &mut [u8] {
        // SAFETY: `mapped` gave the range; one call uses it.
        unsafe { slice_mut(self.addr(bytes.start), bytes) }
    }
}

/// # Safety
/// `bytes` are mapped at `addr`.
unsafe fn slice<'a>(addr: *mut u8, bytes: &Range<u64>) -> &'a [u8] {
    // SAFETY: as the caller says.
    unsafe { std::slice::from_raw_parts(addr, (bytes.end - bytes.start) as usize) }
}

/// # Safety
/// `bytes` are mapped at `addr` for stores.
unsafe fn slice_mut<'a>(addr: *mut u8, bytes: &Range<u64>) -> &'a mut [u8] {
    // SAFETY: as the caller says.
    unsafe { std::slice::from_raw_parts_mut(addr, (bytes.end - bytes.start) as usize) }
}

/// Another place for an operation's bytes, the same whenever the program runs.
fn elsewhere(op: Op) -> u64 {
    let mixed = op.at.wrapping_mul(0x9e37_79b9).wrapping_add(op.len * 31) % SIZE_MAX;
    match op.len % 4 {
        // Close by, so that the two overlap.
        0 => op.at,
        1 => op.at + mixed % 300,
        2 => mixed / PAGE * PAGE,
        _ => mixed,
    }
}

impl Machine {
    pub fn mapped_step(&mut self, op: Op, tag: usize) -> Outcome {
        let Op { verb, at, len } = op;
        let bytes = at..at + len;
        match verb {
            Verb::Map => self.map_anew(MapAccess::Write, &bytes),
            Verb::MapRead => self.map_anew(MapAccess::Read, &bytes),
            Verb::MapPrivate => self.map_anew(MapAccess::Private, &bytes),
            Verb::Remap => self.remap(MapAccess::Write, len),
            Verb::RemapPrivate => self.remap(MapAccess::Private, len),
            Verb::Unmap => self.unmap_part(MapAccess::Write, &bytes),
            Verb::UnmapPrivate => self.unmap_part(MapAccess::Private, &bytes),
            Verb::Load => self.load(&bytes),
            Verb::Store => self.store(&bytes, tag),
            Verb::StorePrivate => self.store_private(&bytes, tag),
            Verb::Calls => self.calls(&bytes, tag),
            Verb::DropEntries => self.advise(MapAccess::Write, Advice::DontNeed, &bytes),
            Verb::DropCopies => self.advise(MapAccess::Private, Advice::DontNeed, &bytes),
            Verb::Advise => {
                let pattern = [Advice::Normal, Advice::Random, Advice::Sequential][tag % 3];
                self.advise(MapAccess::Write, pattern, &bytes)?;
                self.advise(MapAccess::Write, Advice::WillNeed, &bytes)
            }
            Verb::Flush => self.flush_part(&bytes),
            Verb::Pin => self.pin(&bytes, tag),
            Verb::WriteMapped => self.write_mapped(op, false),
            Verb::ReadMapped => self.read_mapped(op, false),
            Verb::WriteMappedDirect => self.write_mapped(op, true),
            Verb::ReadMappedDirect => self.read_mapped(op, true),
            Verb::WritePrivate => self.write_private(op),
            Verb::ReadPrivate => self.read_private(op),
            Verb::WriteOther => self.write_other(op),
            Verb::ReadOther => self.read_other(op),
            Verb::OtherWrites => self.other_writes(op),
            Verb::OtherReads => self.other_reads(op),
            _ => {
                // Some keep memory pinned while they call: that keeps the file for the node.
                self.now = self.maps.node().unwrap_or(self.now);
                self.mixed_step(op, tag)
            }
        }
    }

    /// Returns a mapping, made over everything if there is none.
    fn map(&mut self, access: MapAccess) -> Result<&mut Map, String> {
        let missing = match access {
            MapAccess::Write => self.maps.shared.is_none(),
            MapAccess::Read => self.maps.read.is_none(),
            MapAccess::Private => self.maps.private.is_none(),
        };
        if missing {
            self.map_anew(access, &(0..SIZE_MAX))?;
        }
        let slot = match access {
            MapAccess::Write => &mut self.maps.shared,
            MapAccess::Read => &mut self.maps.read,
            MapAccess::Private => &mut self.maps.private,
        };
        Ok(slot.as_mut().expect("made above"))
    }

    fn map_anew(&mut self, access: MapAccess, bytes: &Range<u64>) -> Outcome {
        let first = bytes.start / PAGE;
        let end = bytes.end.max(first * PAGE + 1);
        // Every third one is told of first stores by faults, every third one looks for them where that is possible.
        let tracking = [Tracking::Auto, Tracking::Sync, Tracking::Async][(first % 3) as usize];
        let options = MapOptions::new().access(access).delivery(self.delivery());
        let file = &self.files().buffered;
        let mapping = file
            .map(first * PAGE..end, &options.tracking(tracking))
            .or_else(|_| file.map(first * PAGE..end, &options));
        let map = Map {
            mapping: said("map", mapping)?,
            node: self.now,
            first,
            live: vec![true; (end.div_ceil(PAGE) - first) as usize],
        };
        match access {
            MapAccess::Write => self.maps.shared = Some(map),
            MapAccess::Read => self.maps.read = Some(map),
            MapAccess::Private => {
                self.maps.copies = vec![None; (SIZE_MAX / PAGE) as usize + 1];
                self.maps.private = Some(map);
            }
        }
        Ok(())
    }

    /// Returns what of `bytes` a mapping shows, up to the end of the file.
    pub fn part(
        &mut self,
        access: MapAccess,
        bytes: &Range<u64>,
    ) -> Result<(&Map, Range<u64>), String> {
        let size = self.bytes.len() as u64;
        let map = self.map(access)?;
        let part = map.mapped(bytes.start..bytes.end.min(size).max(bytes.start));
        Ok((map, part))
    }

    fn unmap_part(&mut self, access: MapAccess, bytes: &Range<u64>) -> Outcome {
        let map = self.map(access)?;
        let all = map.pages();
        let pages = (bytes.start / PAGE).max(all.start)..bytes.end.div_ceil(PAGE).min(all.end);
        if pages.is_empty() {
            return Ok(());
        }
        let (start, end) = (pages.start - all.start, pages.end - all.start);
        let whole = (start * PAGE) as usize..((end * PAGE) as usize).min(map.mapping.len());
        said("unmap", map.mapping.unmap(whole))?;
        map.live[start as usize..end as usize].fill(false);
        Ok(())
    }

    fn remap(&mut self, access: MapAccess, len: u64) -> Outcome {
        let may_move = !len.is_multiple_of(4);
        let len = len.max(1);
        let map = self.map(access)?;
        let (now, then) = (map.live.len(), len.div_ceil(PAGE) as usize);
        let torn = then > now && map.live.contains(&false);
        let before = (map.mapping.as_ptr(), map.mapping.len());
        // At most SIZE_MAX.
        match map.mapping.remap(len as usize, may_move) {
            Ok(()) if torn => return Err("a torn mapping grew".into()),
            Ok(()) => {
                map.live.resize(then, true);
                same("the new length", map.mapping.len(), len as usize)?;
                if !may_move {
                    same("the address", map.mapping.as_ptr(), before.0)?;
                }
            }
            Err(error) => {
                let expected = if torn { Errno::EFAULT } else { Errno::ENOMEM };
                same("remap's error", error.errno(), expected)?;
                same("that it may be one", torn || !may_move, true)?;
                same("place", (map.mapping.as_ptr(), map.mapping.len()), before)?;
                return Ok(());
            }
        }
        let changed = map.first as usize + now.min(then)..map.first as usize + now.max(then);
        if access == MapAccess::Private {
            // Neither unmapped pages nor new ones have been stored to.
            for copy in self
                .maps
                .copies
                .iter_mut()
                .take(changed.end)
                .skip(changed.start)
            {
                *copy = None;
            }
        }
        Ok(())
    }

    fn load(&mut self, bytes: &Range<u64>) -> Outcome {
        for access in [MapAccess::Write, MapAccess::Read] {
            let (map, part) = self.part(access, bytes)?;
            let got = map.load(&part);
            let len = part.end - part.start;
            self.compare(&format!("load ({access:?})"), part.start, &got, len)?;
        }
        let (map, part) = self.part(MapAccess::Private, bytes)?;
        let got = map.load(&part);
        self.compare_private("load (Private)", part.start, &got)
    }

    fn private_byte(&self, at: u64) -> Option<u8> {
        match &self.maps.copies[(at / PAGE) as usize] {
            Some(copy) => copy[(at % PAGE) as usize],
            None => Some(self.bytes[at as usize]),
        }
    }

    fn compare_private(&self, what: &str, at: u64, got: &[u8]) -> Outcome {
        for (at, &got) in (at..).zip(got) {
            let want = self.private_byte(at);
            if want.is_some_and(|want| want != got) {
                return Err(format!(
                    "{what}: byte {at} is {got:#04x}, expected {want:02x?}"
                ));
            }
        }
        Ok(())
    }

    fn store(&mut self, bytes: &Range<u64>, tag: usize) -> Outcome {
        let size = self.bytes.len() as u64;
        let map = self.map(MapAccess::Write)?;
        // Past the end as far as the page goes.
        let end = bytes.end.min(size.next_multiple_of(PAGE));
        let part = map.mapped(bytes.start..end.max(bytes.start));
        let source = Self::pattern(part.start, part.end - part.start, tag);
        map.store(part.start, &source);
        let kept = size.clamp(part.start, part.end) - part.start;
        self.note(part.start, &source[..kept as usize]);
        Ok(())
    }

    /// Notes that bytes of the private mapping were stored to.
    fn note_private(&mut self, at: u64, source: &[u8]) {
        for (at, &byte) in (at..).zip(source) {
            let first = at / PAGE * PAGE;
            let file = &self.bytes;
            let copy = self.maps.copies[(at / PAGE) as usize].get_or_insert_with(|| {
                let page = first..first + PAGE;
                page.map(|at| file.get(at as usize).copied()).collect()
            });
            copy[(at % PAGE) as usize] = Some(byte);
        }
    }

    fn store_private(&mut self, bytes: &Range<u64>, tag: usize) -> Outcome {
        let (map, part) = self.part(MapAccess::Private, bytes)?;
        let source = Self::pattern(part.start, part.end - part.start, tag);
        map.store(part.start, &source);
        self.note_private(part.start, &source);
        Ok(())
    }

    fn calls(&mut self, bytes: &Range<u64>, tag: usize) -> Outcome {
        let (map, part) = self.part(MapAccess::Write, bytes)?;
        let len = (part.end - part.start) as usize;
        if len == 0 {
            return Ok(());
        }
        let mut got = vec![0; len];
        let at = map.at(part.start);
        let read = said("a mapping's read", map.mapping.read(at, &mut got))?;
        same("bytes read by the mapping", read, len)?;
        let source = Self::pattern(part.start, len as u64 / 2, tag);
        let wrote = said("a mapping's write", map.mapping.write(at, &source))?;
        same("bytes written by the mapping", wrote, source.len())?;
        self.compare("a mapping's read", part.start, &got, len as u64)?;
        self.note(part.start, &source);
        Ok(())
    }

    fn advise(&mut self, access: MapAccess, advice: Advice, bytes: &Range<u64>) -> Outcome {
        let size = SIZE_MAX;
        let map = self.map(access)?;
        let part = map.mapped(bytes.start..bytes.end.min(size).max(bytes.start));
        let end = map.at(part.end).min(map.mapping.len());
        let range = map.at(part.start).min(end)..end;
        if range.is_empty() {
            return Ok(());
        }
        said("advise", map.mapping.advise(advice, range))?;
        if access == MapAccess::Private && advice == Advice::DontNeed {
            for page in part.start / PAGE..part.end.div_ceil(PAGE) {
                self.maps.copies[page as usize] = None;
            }
        }
        Ok(())
    }

    fn flush_part(&mut self, bytes: &Range<u64>) -> Outcome {
        let (map, part) = self.part(MapAccess::Write, bytes)?;
        let range = map.at(part.start.min(part.end))..map.at(part.end);
        if range.is_empty() {
            return Ok(());
        }
        said("flush", map.mapping.flush(range))?;
        self.check_stored_part(part)
    }

    /// Has the system store to one half of pinned bytes and load the other.
    fn pin(&mut self, bytes: &Range<u64>, tag: usize) -> Outcome {
        let most = (self.pages / 4).saturating_sub(1) * PAGE;
        let (map, part) = self.part(MapAccess::Write, bytes)?;
        let part = part.start..part.end.min(part.start + most);
        if part.is_empty() {
            return Ok(());
        }
        let pinned = map.mapping.pin(map.at(part.start)..map.at(part.end), true);
        let pinned = said("pin", pinned)?;
        let half = part.start + (part.end - part.start) / 2;
        let source = Self::pattern(part.start, half - part.start, tag);
        let file = tempfile::tempfile().map_err(|error| error.to_string())?;
        std::os::unix::fs::FileExt::write_all_at(&file, &source, 0)
            .map_err(|error| error.to_string())?;
        let into = map.target(&(part.start..half));
        // SAFETY: a plain system call on memory that is there.
        let got = unsafe { libc::pread(file.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), 0) };
        same("bytes the system stored", got, source.len() as isize)?;
        let from = map.buffer(&(half..part.end));
        // SAFETY: as above.
        let put = unsafe { libc::pwrite(file.as_raw_fd(), from.as_ptr().cast(), from.len(), 0) };
        same("bytes the system loaded", put, from.len() as isize)?;
        drop(pinned);
        let mut loaded = vec![0; from.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut loaded, 0)
            .map_err(|error| error.to_string())?;
        self.note(part.start, &source);
        self.compare("loaded by the system", half, &loaded, part.end - half)
    }

    /// Takes over what a transfer between overlapping ranges left: its order is nobody's promise.
    fn adopt(&mut self, from: &Range<u64>, to: &Range<u64>) -> Outcome {
        let both = from.start.max(to.start)..from.end.min(to.end);
        if from.start == to.start || both.is_empty() {
            return Ok(());
        }
        let mut back = vec![0; (to.end - to.start) as usize];
        let got = said(
            "read_at",
            self.files().buffered.read_at(&mut back, to.start),
        )?;
        same("bytes after an overlap", got, back.len())?;
        self.note(to.start, &back);
        Ok(())
    }

    fn write_mapped(&mut self, op: Op, direct: bool) -> Outcome {
        let (to, from) = (op.at, elsewhere(op));
        let (to, from, len) = if direct {
            (to / PAGE * PAGE, from, op.len / PAGE * PAGE)
        } else {
            (to, from, op.len)
        };
        let (map, part) = self.part(MapAccess::Write, &(from..from + len))?;
        let len = (part.end - part.start).min(SIZE_MAX - to);
        let len = if direct { len / PAGE * PAGE } else { len };
        let part = part.start..part.start + len;
        if direct && part.start % 512 != 0 {
            return Ok(());
        }
        let buffer = map.buffer(&part).as_ptr();
        let file = if direct {
            &self.files().direct
        } else {
            &self.files().buffered
        };
        // SAFETY: mapped; `self.files` does not unmap.
        let source = unsafe { slice(buffer.cast_mut(), &part) };
        let wrote = said("write from a mapping", file.write_at(source, to))?;
        same("bytes written from a mapping", wrote as u64, len)?;
        let source = self.expected(part.start, len).to_vec();
        self.note(to, &source);
        self.adopt(&part, &(to..to + len))
    }

    fn read_mapped(&mut self, op: Op, direct: bool) -> Outcome {
        let (from, into) = (op.at, elsewhere(op));
        let (from, len) = if direct {
            (from / PAGE * PAGE, op.len / PAGE * PAGE)
        } else {
            (from, op.len)
        };
        let size = self.bytes.len() as u64;
        let (map, part) = self.part(MapAccess::Write, &(into..into + len))?;
        let len = part.end - part.start;
        let len = if direct { len / PAGE * PAGE } else { len };
        let part = part.start..part.start + len;
        if direct && part.start % 512 != 0 {
            return Ok(());
        }
        let buffer = map.addr(part.start);
        let file = if direct {
            &self.files().direct
        } else {
            &self.files().buffered
        };
        // SAFETY: mapped; `self.files` does not unmap.
        let target = unsafe { slice_mut(buffer, &part) };
        let want = size.saturating_sub(from).min(len);
        let read = said("read into a mapping", file.read_at(target, from))?;
        same("bytes read into a mapping", read as u64, want)?;
        let source = self.expected(from, want).to_vec();
        self.note(part.start, &source);
        // A direct read past the end may overwrite the rest of its last block.
        let rest = if direct {
            want.next_multiple_of(PAGE).min(len)
        } else {
            want
        };
        let touched = part.start..part.start + rest;
        if rest > want {
            let mut back = vec![0; (rest - want) as usize];
            let got = self.files().buffered.read_at(&mut back, part.start + want);
            same(
                "bytes after a short direct read",
                said("read_at", got)?,
                back.len(),
            )?;
            self.note(part.start + want, &back);
        }
        self.adopt(&(from..from + want), &touched)
    }

    fn write_private(&mut self, op: Op) -> Outcome {
        let from = elsewhere(op);
        let (map, part) = self.part(MapAccess::Private, &(from..from + op.len))?;
        let len = (part.end - part.start).min(SIZE_MAX - op.at);
        let part = part.start..part.start + len;
        let buffer = map.addr(part.start);
        // What it holds by its own loads, which other operations compare.
        let source = map.load(&part);
        // SAFETY: mapped.
        let buffer = unsafe { slice(buffer, &part) };
        let wrote = self.files().buffered.write_at(buffer, op.at);
        same(
            "bytes written from a private mapping",
            said("write", wrote)? as u64,
            len,
        )?;
        self.compare_private("before a write from a private mapping", part.start, &source)?;
        self.note(op.at, &source);
        self.adopt(&part, &(op.at..op.at + len))
    }

    fn read_private(&mut self, op: Op) -> Outcome {
        let into = elsewhere(op);
        let size = self.bytes.len() as u64;
        let (map, part) = self.part(MapAccess::Private, &(into..into + op.len))?;
        let len = part.end - part.start;
        // SAFETY: mapped.
        let target = unsafe { slice_mut(map.addr(part.start), &part) };
        let read = said("read", self.files().buffered.read_at(target, op.at))?;
        let want = size.saturating_sub(op.at).min(len);
        same("bytes read into a private mapping", read as u64, want)?;
        let source = self.expected(op.at, want).to_vec();
        self.note_private(part.start, &source);
        Ok(())
    }

    pub fn other_map(&mut self) -> Result<&Mapping, String> {
        if self.maps.other.is_none() {
            let options = MapOptions::new()
                .access(MapAccess::Write)
                .delivery(self.delivery());
            let other: &File = &self.files().other;
            let mapping = said("map", other.map(0..other.len(), &options))?;
            self.maps.other = Some(mapping);
        }
        Ok(self.maps.other.as_ref().expect("made above"))
    }

    /// Returns a piece of the other file that an operation of this is about.
    fn other_part(&self, op: Op) -> Range<u64> {
        let size = self.other.len() as u64;
        let start = elsewhere(op) % size;
        start..(start + op.len).min(size)
    }

    fn write_other(&mut self, op: Op) -> Outcome {
        let part = self.other_part(op);
        let len = (part.end - part.start).min(SIZE_MAX - op.at);
        let part = part.start..part.start + len;
        let addr = self
            .other_map()?
            .as_mut_ptr()
            .wrapping_add(part.start as usize);
        // SAFETY: mapped.
        let source = unsafe { slice(addr, &part) };
        let wrote = said(
            "write from another file's",
            self.files().buffered.write_at(source, op.at),
        )?;
        same("bytes written from another file's", wrote as u64, len)?;
        let source = self.other[part.start as usize..part.end as usize].to_vec();
        self.note(op.at, &source);
        Ok(())
    }

    fn read_other(&mut self, op: Op) -> Outcome {
        let part = self.other_part(op);
        let addr = self
            .other_map()?
            .as_mut_ptr()
            .wrapping_add(part.start as usize);
        // SAFETY: mapped.
        let target = unsafe { slice_mut(addr, &part) };
        let read = said(
            "read into another file's",
            self.files().buffered.read_at(target, op.at),
        )?;
        let source = self.expected(op.at, part.end - part.start).to_vec();
        same("bytes read into another file's", read, source.len())?;
        let start = part.start as usize;
        self.other[start..start + source.len()].copy_from_slice(&source);
        Ok(())
    }

    fn other_writes(&mut self, op: Op) -> Outcome {
        let to = self.other_part(op);
        let (map, part) = self.part(MapAccess::Write, &(op.at..op.at + to.end - to.start))?;
        // SAFETY: mapped.
        let source = unsafe { slice(map.addr(part.start), &part) };
        let wrote = said(
            "write the other",
            self.files().other.write_at(source, to.start),
        )?;
        same("bytes written to the other", wrote, source.len())?;
        let source = self.expected(part.start, part.end - part.start).to_vec();
        let start = to.start as usize;
        self.other[start..start + source.len()].copy_from_slice(&source);
        Ok(())
    }

    fn other_reads(&mut self, op: Op) -> Outcome {
        let from = self.other_part(op);
        let (map, part) = self.part(MapAccess::Write, &(op.at..op.at + from.end - from.start))?;
        // SAFETY: mapped.
        let target = unsafe { slice_mut(map.addr(part.start), &part) };
        let len = target.len();
        let read = said(
            "read the other",
            self.files().other.read_at(target, from.start),
        )?;
        same("bytes read from the other", read, len)?;
        let start = from.start as usize;
        let source = self.other[start..start + len].to_vec();
        self.note(part.start, &source);
        Ok(())
    }

    /// Compares what the mappings show, and the other file.
    pub fn check_maps(&self) -> Outcome {
        let size = self.bytes.len() as u64;
        for access in [MapAccess::Write, MapAccess::Read, MapAccess::Private] {
            let made = match access {
                MapAccess::Write => &self.maps.shared,
                MapAccess::Read => &self.maps.read,
                MapAccess::Private => &self.maps.private,
            };
            let Some(map) = made else { continue };
            let mut at = map.first * PAGE;
            while at < size.min(map.pages().end * PAGE) {
                let part = map.mapped(at..(at / PAGE + 1) * PAGE);
                at = (at / PAGE + 1) * PAGE;
                let part = part.start..part.end.min(size).max(part.start);
                let got = map.load(&part);
                if access == MapAccess::Private {
                    self.compare_private("shown privately", part.start, &got)?;
                } else {
                    self.compare(
                        &format!("shown ({access:?})"),
                        part.start,
                        &got,
                        part.end - part.start,
                    )?;
                }
            }
        }
        let mut other = vec![0; self.other.len()];
        let got = said("read_at", self.files().other.read_at(&mut other, 0))?;
        same("bytes of the other file", got, other.len())?;
        let bad = other
            .iter()
            .zip(&self.other)
            .position(|(got, want)| got != want);
        same("the other file's first bad byte", bad, None)
    }
}
