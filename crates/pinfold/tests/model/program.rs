//! Programs: lists of operations on one file, made from a seed, printed, parsed, and made smaller.

use std::fmt;
use std::str::FromStr;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// Largest file, in bytes.
pub const SIZE_MAX: u64 = 1 << 20;
/// Largest transfer, in bytes.
const LEN_MAX: u64 = 160 << 10;
/// Operations of a generated program.
const OPS: std::ops::Range<usize> = 20..200;

macro_rules! verbs {
    ($($(#[$doc:meta])* $name:ident $text:literal $weight:literal,)*) => {
        /// What an operation does with the `len` bytes at `at`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Verb { $($(#[$doc])* $name,)* }

        /// Each with its name and how often it is chosen.
        const VERBS: &[(Verb, &str, u32)] = &[$((Verb::$name, $text, $weight),)*];
    };
}

verbs! {
    /// Writes them.
    Write "write" 30,
    /// Writes them from three buffers, one of them empty.
    WriteVectored "writev" 8,
    /// Writes them from a buffer of which only the first half is accessible.
    WriteBad "write-bad" 4,
    /// Appends `len` bytes.
    Append "append" 6,
    /// Reads them and compares.
    Read "read" 25,
    /// Reads them into three buffers, one of them empty, and compares.
    ReadVectored "readv" 6,
    /// Reads them into a buffer of which only the first half is accessible.
    ReadBad "read-bad" 3,
    /// Writes whole pages around the cache.
    WriteDirect "write-direct" 10,
    /// Reads whole pages around the cache.
    ReadDirect "read-direct" 8,
    /// Sets the size to `at`.
    SetLen "set-len" 8,
    /// Punches a hole.
    Punch "punch" 6,
    /// Zeroes the range, size unchanged.
    Zero "zero" 3,
    /// Zeroes the range, growing the file over it.
    ZeroExtend "zero-extend" 2,
    /// Reserves the range, size unchanged.
    Allocate "allocate" 2,
    /// Reserves the range, growing the file over it.
    AllocateExtend "allocate-extend" 2,
    /// Takes the whole pages of the range out.
    Collapse "collapse" 2,
    /// Puts whole pages in.
    Insert "insert" 2,
    /// Looks for data and for a hole from `at` on.
    Seek "seek" 3,
    /// Makes all durable and compares the stored file.
    Sync "sync" 4,
    /// Makes the data durable and compares the stored file.
    SyncData "sync-data" 3,
    /// Writes back and drops what is cached.
    DropCache "drop-cache" 6,
    /// Closes and opens the file.
    Reopen "reopen" 3,
    /// Closes the volume, compares the stored file, and opens a new volume.
    Remount "remount" 1,
    /// Compares the whole file, and what mappings show of it.
    Check "check" 3,
    /// Maps the pages of the range anew, for loads and stores.
    Map "map" 3,
    /// Maps them anew, for loads.
    MapRead "map-read" 2,
    /// Maps them anew, with stores that stay with the mapping.
    MapPrivate "map-private" 2,
    /// Makes the mapping for stores `len` bytes long, where it is or, for three of four lengths, wherever there is room.
    Remap "remap" 4,
    /// The same for the private mapping.
    RemapPrivate "remap-private" 4,
    /// Takes whole pages out of the mapping for stores.
    Unmap "unmap" 2,
    /// Takes whole pages out of the private mapping.
    UnmapPrivate "unmap-private" 1,
    /// Loads the bytes through each mapping.
    Load "load" 14,
    /// Stores them as far as the page that holds the end goes.
    Store "store" 16,
    /// Stores them in the private mapping.
    StorePrivate "store-private" 5,
    /// Reads and writes them by the mapping's own calls.
    Calls "calls" 5,
    /// Drops the entries of the mapping for stores.
    DropEntries "drop-entries" 3,
    /// Drops the entries of the private mapping, and its copies.
    DropCopies "drop-copies" 2,
    /// Announces them to be needed soon, and how they will be walked through.
    Advise "advise" 2,
    /// Makes stores to them durable.
    Flush "flush" 2,
    /// Pins them and lets the system read and write them.
    Pin "pin" 4,
    /// Writes them from the mapping of another part of the file.
    WriteMapped "write-mapped" 6,
    /// Reads them into the mapping of another part.
    ReadMapped "read-mapped" 5,
    /// Writes whole pages around the cache from the mapping of another part.
    WriteMappedDirect "write-mapped-direct" 4,
    /// Reads whole pages around the cache into the mapping of another part.
    ReadMappedDirect "read-mapped-direct" 4,
    /// Writes them from the private mapping.
    WritePrivate "write-private" 3,
    /// Reads them into the private mapping.
    ReadPrivate "read-private" 3,
    /// Writes them from the mapping of another file.
    WriteOther "write-other" 4,
    /// Reads them into the mapping of another file.
    ReadOther "read-other" 4,
    /// Writes the other file from the mapping of this.
    OtherWrites "other-writes" 4,
    /// Reads the other file into the mapping of this.
    OtherReads "other-reads" 3,
    /// Writes them from plain memory and two files' mappings in one call.
    WriteMixed "write-mixed" 4,
    /// Reads them into the same.
    ReadMixed "read-mixed" 4,
    /// Writes what can be written without waiting.
    WriteNowait "write-nowait" 3,
    /// Reads what can be read without waiting.
    ReadNowait "read-nowait" 3,
    /// Writes them durably.
    WriteDurable "write-durable" 2,
    /// Writes and reads whole pages around the cache, both under way at once, with other calls beside them.
    Submit "submit" 4,
    /// The same from and to the mapping of another file.
    SubmitMapped "submit-mapped" 4,
    /// Keeps whole pages pinned while calls go over them.
    WhilePinned "while-pinned" 5,
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// What.
    pub verb: Verb,
    /// Where, in bytes.
    pub at: u64,
    /// How much, in bytes.
    pub len: u64,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = VERBS
            .iter()
            .find(|(verb, ..)| *verb == self.verb)
            .map_or("?", |(_, name, _)| name);
        write!(f, "{name} {} {}", self.at, self.len)
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let verb = VERBS
            .iter()
            .find(|(_, known, _)| *known == name)
            .map(|(verb, ..)| *verb)
            .ok_or_else(|| format!("no operation is called {name:?}"))?;
        let mut number = || -> Result<u64, String> {
            let word = words
                .next()
                .ok_or_else(|| format!("{line:?} lacks a number"))?;
            word.parse().map_err(|_| format!("{word:?} is no number"))
        };
        Ok(Self {
            verb,
            at: number()?,
            len: number()?,
        })
    }
}

/// A list of operations, and what kind of volume they run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The volume's budget, in pages.
    pub pages: u64,
    /// Whether the faulting thread serves its faults itself.
    pub inline: bool,
    /// What is done.
    pub ops: Vec<Op>,
}

impl Program {
    /// Makes a program from a seed.
    pub fn generate(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let budgets = [64, 64, 80, 128, 300, 2048, 16384];
        let pages = budgets[rng.random_range(0..budgets.len())];
        // Small files meet their edges more often; large ones overflow a small cache.
        let reach = [3 * 4096, 64 << 10, SIZE_MAX][rng.random_range(0..3)];
        let count = rng.random_range(OPS);
        let ops = (0..count).map(|_| op(&mut rng, reach)).collect();
        let inline = rng.random();
        Self { pages, inline, ops }
    }
}

fn op(rng: &mut SmallRng, reach: u64) -> Op {
    let sum: u32 = VERBS.iter().map(|(.., weight)| weight).sum();
    let mut ticket = rng.random_range(0..sum);
    let verb = VERBS
        .iter()
        .find(|(.., weight)| {
            let hit = ticket < *weight;
            ticket = ticket.saturating_sub(*weight);
            hit
        })
        .map_or(Verb::Check, |(verb, ..)| *verb);
    let at = place(rng, reach);
    let len = place(rng, LEN_MAX.min(reach)).min(SIZE_MAX - at);
    Op { verb, at, len }
}

/// Chooses a number below `reach`: on page borders, beside them, or anywhere.
fn place(rng: &mut SmallRng, reach: u64) -> u64 {
    let anywhere = rng.random_range(0..reach);
    match rng.random_range(0..6) {
        0 => anywhere / 4096 * 4096,
        1 => (anywhere / 4096 * 4096 + 1).min(reach - 1),
        2 => (anywhere / 4096 * 4096).saturating_sub(1),
        3 => anywhere / 512 * 512,
        4 => rng.random_range(0..reach.min(200)),
        _ => anywhere,
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.inline { " inline" } else { "" };
        writeln!(f, "pages {}{how}", self.pages)?;
        for op in &self.ops {
            writeln!(f, "{op}")?;
        }
        Ok(())
    }
}

impl FromStr for Program {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut lines = text
            .lines()
            .map(|line| line.split('#').next().unwrap_or_default().trim())
            .filter(|line| !line.is_empty());
        let how = lines
            .next()
            .and_then(|line| line.strip_prefix("pages "))
            .ok_or("a program begins with \"pages N\"")?;
        let (number, inline) = match how.strip_suffix(" inline") {
            Some(number) => (number, true),
            None => (how, false),
        };
        let pages = number
            .trim()
            .parse()
            .map_err(|_| format!("{number:?} is no number of pages"))?;
        let ops = lines.map(str::parse).collect::<Result<_, _>>()?;
        Ok(Self { pages, inline, ops })
    }
}

/// Most trials that making a program smaller may take.
const TRIALS_MAX: usize = 400;

/// Makes a failing program smaller as long as it fails: fewer operations first, then smaller numbers.
pub fn shrink(program: &Program, mut fails: impl FnMut(&Program) -> bool) -> Program {
    let mut best = program.clone();
    let mut trials = 0;
    let mut try_ops = |best: &mut Program, ops: Vec<Op>| {
        trials += 1;
        let candidate = Program {
            pages: best.pages,
            inline: best.inline,
            ops,
        };
        let smaller = trials <= TRIALS_MAX && fails(&candidate);
        if smaller {
            *best = candidate;
        }
        smaller
    };
    let mut chunk = best.ops.len().div_ceil(2);
    while chunk > 0 {
        let mut start = 0;
        while start < best.ops.len() {
            let mut ops = best.ops.clone();
            ops.drain(start..(start + chunk).min(ops.len()));
            // What is gone leaves the next chunk at the same place.
            if !try_ops(&mut best, ops) {
                start += chunk;
            }
        }
        chunk = if chunk == 1 { 0 } else { chunk.div_ceil(2) };
    }
    for index in 0..best.ops.len() {
        for simpler in simpler(best.ops[index]) {
            let mut ops = best.ops.clone();
            ops[index] = simpler;
            if try_ops(&mut best, ops) {
                break;
            }
        }
    }
    best
}

fn simpler(op: Op) -> Vec<Op> {
    let with = |at, len| Op { at, len, ..op };
    let page = |number: u64| number / 4096 * 4096;
    let mut list = vec![
        with(0, 1),
        with(op.at, 1),
        with(page(op.at), 4096),
        with(0, op.len),
        with(op.at, op.len / 2),
        with(page(op.at), op.len),
        with(op.at, page(op.len)),
    ];
    list.retain(|other| *other != op && other.len <= op.len && other.at <= op.at);
    list
}

#[test]
fn a_program_survives_being_printed_and_parsed() {
    for seed in 0..20 {
        let program = Program::generate(seed);
        assert_eq!(program.to_string().parse::<Program>(), Ok(program));
    }
    let commented = "# why\npages 64\n\nwrite 1 2 # here\n";
    assert_eq!(commented.parse::<Program>().unwrap().ops.len(), 1);
    assert!("write 1 2".parse::<Program>().is_err());
    assert!("pages 64\nwrote 1 2".parse::<Program>().is_err());
}

#[test]
fn shrinking_finds_the_two_operations_that_matter() {
    let needs = |program: &Program| {
        let first = program.ops.iter().position(|op| op.verb == Verb::Punch);
        let second = program.ops.iter().rposition(|op| op.verb == Verb::Write);
        matches!((first, second), (Some(first), Some(second)) if first < second)
    };
    let program = (0..100)
        .map(Program::generate)
        .find(|program| needs(program));
    let program = program.expect("one of a hundred has both");
    let small = shrink(&program, needs);
    assert_eq!(small.ops.len(), 2, "{small}");
    assert!(needs(&small));
    assert_eq!((small.ops[0].at, small.ops[0].len), (0, 1));
}
