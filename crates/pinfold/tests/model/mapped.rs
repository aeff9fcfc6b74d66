//! The part of the machine that maps the file: loads, stores, and mapped memory as the buffer of a call.

use std::ops::Range;

use pinfold::{Advice, Delivery, File, IoOptions, IovCursor, MapAccess, MapOptions, Mapping};

use super::machine::{Machine, Outcome, PAGE, said, same};
use super::program::SIZE_MAX;

/// What is mapped: the largest file, whatever its size is now.
const MAPPED: Range<u64> = 0..2 * SIZE_MAX;

/// The file's mapping, and how many there were.
#[derive(Default)]
pub struct Mapped {
    mapping: Option<Mapping>,
    made: u64,
}

impl Machine {
    /// Maps the file if it is not; in turn by either delivery.
    fn mapping(&mut self) -> Result<(), String> {
        if self.mapped.mapping.is_some() {
            return Ok(());
        }
        let delivery = if (self.mapped.made + self.pages).is_multiple_of(2) {
            Delivery::Handler
        } else {
            Delivery::Inline
        };
        let options = MapOptions::new()
            .access(MapAccess::Write)
            .delivery(delivery);
        let mapping = said("map", self.files().buffered.map(MAPPED, &options))?;
        self.mapped.mapping = Some(mapping);
        self.mapped.made += 1;
        Ok(())
    }

    /// The mapped bytes of a range as a buffer; the library makes raw copies of them.
    #[expect(clippy::mut_from_ref, reason = "memory that anybody may change")]
    fn memory(&self, range: &Range<u64>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= MAPPED.end);
        let mapping = self.mapped.mapping.as_ref().expect("mapped before");
        let addr = mapping.as_mut_ptr().wrapping_add(range.start as usize);
        let len = (range.end - range.start) as usize;
        // SAFETY: inside the mapping, and used by one call of this one thread at a time.
        unsafe { std::slice::from_raw_parts_mut(addr, len) }
    }

    fn within_file(&self, at: u64, len: u64) -> Range<u64> {
        let size = self.bytes.len() as u64;
        at.min(size)..(at + len).min(size).max(at.min(size))
    }

    pub fn unmap(&mut self) -> Outcome {
        self.mapped.mapping = None;
        Ok(())
    }

    pub fn load(&mut self, at: u64, len: u64) -> Outcome {
        self.mapping()?;
        let range = self.within_file(at, len);
        let got = self.memory(&range).to_vec();
        self.compare("load", range.start, &got, range.end - range.start)?;
        let mapping = self.mapped.mapping.as_ref().expect("mapped above");
        let mut got = vec![0xa5; len as usize];
        let n = said("Mapping::read", mapping.read(at as usize, &mut got))?;
        self.compare("copied load", at, &got[..n], len)
    }

    pub fn store(&mut self, at: u64, len: u64, tag: usize) -> Outcome {
        self.mapping()?;
        let range = self.within_file(at, len);
        let source = Self::pattern(range.start, range.end - range.start, tag);
        if tag.is_multiple_of(2) {
            self.memory(&range).copy_from_slice(&source);
        } else {
            let mapping = self.mapped.mapping.as_ref().expect("mapped above");
            let wrote = mapping.write(range.start as usize, &source);
            same("bytes stored", said("Mapping::write", wrote)?, source.len())?;
        }
        self.note(range.start, &source);
        Ok(())
    }

    /// Stores past the end in the last page: nobody may ever see it in the file.
    pub fn stain(&mut self, len: u64) -> Outcome {
        self.mapping()?;
        let size = self.bytes.len() as u64;
        let page_end = size.next_multiple_of(PAGE);
        self.memory(&(size..(size + len).min(page_end))).fill(0xee);
        Ok(())
    }

    pub fn flush(&mut self, at: u64, len: u64) -> Outcome {
        self.mapping()?;
        let mapping = self.mapped.mapping.as_ref().expect("mapped above");
        said("flush", mapping.flush(at as usize..(at + len) as usize))?;
        self.check_stored_part(self.within_file(at, len))
    }

    pub fn advise(&mut self, at: u64, len: u64) -> Outcome {
        self.mapping()?;
        let kinds = [
            Advice::DontNeed,
            Advice::Random,
            Advice::WillNeed,
            Advice::Sequential,
            Advice::Normal,
        ];
        let advice = kinds[(len % 5) as usize];
        let mapping = self.mapped.mapping.as_ref().expect("mapped above");
        said(
            "advise",
            mapping.advise(advice, at as usize..(at + len) as usize),
        )
    }

    /// Chooses another part of the file, to copy from or to, that does not overlap `len` bytes at `at`.
    fn elsewhere(&self, at: u64, len: u64, unit: u64) -> Range<u64> {
        let size = self.bytes.len() as u64;
        let start = (at / 3 + size / 2) / unit * unit;
        let mut part = self.within_file(start, len);
        if part.start < at {
            part.end = part.end.min(at);
        } else if part.start < at + len {
            part.start = (at + len).min(size);
            part = self.within_file(part.start.next_multiple_of(unit), len);
        }
        part.end -= (part.end - part.start) % unit;
        part
    }

    pub fn write_mapped(&mut self, at: u64, len: u64, direct: bool) -> Outcome {
        self.mapping()?;
        let unit = if direct { PAGE } else { 1 };
        let at = at / unit * unit;
        let from = self.elsewhere(at, len / unit * unit, unit);
        if from.is_empty() || at + (from.end - from.start) > SIZE_MAX {
            return Ok(());
        }
        let mut cursor = IovCursor::from_slice(self.memory(&from));
        let moved = self
            .file_for(direct)
            .write_cursor(&mut cursor, at, &IoOptions::default());
        same(
            "a mapped write's error",
            moved.stop.map(|error| error.errno()),
            None,
        )?;
        same("mapped bytes written", moved.done, from.end - from.start)?;
        let copy = self.bytes[from.start as usize..from.end as usize].to_vec();
        self.note(at, &copy);
        Ok(())
    }

    pub fn read_mapped(&mut self, at: u64, len: u64, direct: bool) -> Outcome {
        self.mapping()?;
        let unit = if direct { PAGE } else { 1 };
        let into = self.within_file(at / unit * unit, len);
        let len = (into.end - into.start) / unit * unit;
        let from = self.elsewhere(into.start, len, unit);
        if from.is_empty() || len == 0 {
            return Ok(());
        }
        let into = into.start..into.start + (from.end - from.start);
        let mut cursor = IovCursor::from_mut_slice(self.memory(&into));
        let moved =
            self.file_for(direct)
                .read_cursor(&mut cursor, from.start, &IoOptions::default());
        same(
            "a mapped read's error",
            moved.stop.map(|error| error.errno()),
            None,
        )?;
        same("mapped bytes read", moved.done, from.end - from.start)?;
        let copy = self.bytes[from.start as usize..from.end as usize].to_vec();
        self.note(into.start, &copy);
        Ok(())
    }

    fn file_for(&self, direct: bool) -> &File {
        if direct {
            &self.files().direct
        } else {
            &self.files().buffered
        }
    }
}
