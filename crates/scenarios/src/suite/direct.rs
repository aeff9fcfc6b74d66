//! Direct I/O by itself: T25 to T28, T39, T41, T43.

use std::ops::Range;

use pinfold_base::Errno;
use pinfold_mem::region::{At, Protection, Region};
use rand::Rng as _;

use super::{P, PAGE, pattern};
use crate::fs::{How, Kind};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T25",
        name: "align",
        claim: "direct I/O whose offset, length or memory is not aligned is EINVAL",
        known: &[
            Known {
                kind: Kind::Btrfs,
                check: "unaligned",
                why: BUFFERED,
            },
            Known {
                kind: Kind::Tmpfs,
                check: "unaligned",
                why: BUFFERED,
            },
            Known {
                kind: Kind::Btrfs,
                check: "unaligned memory",
                why: BUFFERED,
            },
            Known {
                kind: Kind::Tmpfs,
                check: "unaligned memory",
                why: BUFFERED,
            },
            Known {
                kind: Kind::Fuse,
                check: "unaligned memory",
                why: COPIED,
            },
        ],
        seconds_max: 30,
        run: align,
    },
    Scenario {
        number: "T26",
        name: "eof_read",
        claim: "a direct read ends with the file, and leaves memory behind that alone",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: "memory behind the last block",
                why: ZEROES,
            },
            Known {
                kind: Kind::Xfs,
                check: "memory behind the last block",
                why: ZEROES,
            },
            Known {
                kind: Kind::Btrfs,
                check: "memory behind the last block",
                why: ZEROES,
            },
        ],
        seconds_max: 30,
        run: eof_read,
    },
    Scenario {
        number: "T27",
        name: "dio_prefix_read",
        claim: "a direct read whose last four pages are bad reads the first four",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: "count",
                why: WHOLE,
            },
            Known {
                kind: Kind::Xfs,
                check: "count",
                why: WHOLE,
            },
        ],
        seconds_max: 30,
        run: dio_prefix_read,
    },
    Scenario {
        number: "T28",
        name: "dio_prefix_write",
        claim: "a direct write whose last four pages are bad writes the first four, and no cache shows older ones",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: "count",
                why: WHOLE,
            },
            Known {
                kind: Kind::Xfs,
                check: "count",
                why: WHOLE,
            },
        ],
        seconds_max: 30,
        run: dio_prefix_write,
    },
    Scenario {
        number: "T39",
        name: "tail_zero",
        claim: "a direct write of part of a new block leaves the rest of it zeros, also when it fails half way",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: "size",
                why: EXPOSES,
            },
            Known {
                kind: Kind::Ext4,
                check: "the rest zeros",
                why: EXPOSES,
            },
            Known {
                kind: Kind::Xfs,
                check: "what was written",
                why: FORGETS,
            },
        ],
        seconds_max: 60,
        run: tail_zero,
    },
    Scenario {
        number: "T41",
        name: "dirty_then_dio_read",
        claim: "direct reads see buffered writes and buffered reads see direct writes, at once",
        known: &[],
        seconds_max: 60,
        run: dirty_then_dio_read,
    },
    Scenario {
        number: "T43",
        name: "hole_read_bad",
        claim: "a direct read of a hole into half bad memory reads zeros into the good half",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: "count",
                why: WHOLE,
            },
            Known {
                kind: Kind::Xfs,
                check: "count",
                why: WHOLE,
            },
        ],
        seconds_max: 30,
        run: hole_read_bad,
    },
];

const COPIED: &str =
    "a FUSE request carries the bytes, and no address of the caller's memory that could be refused";
const BUFFERED: &str = "what is not aligned is done through the cache";
const ZEROES: &str = "the rest of the buffer is zeroed";
const WHOLE: &str = "a transfer that meets bad memory is EFAULT, although a prefix was moved";
const EXPOSES: &str = "when an extending write of parts of blocks fails with EFAULT, the file may stay longer, and what \
                       its new blocks held before shows when it grows further";
const FORGETS: &str = "a fault half way is answered with the bytes done, but the part of the last block that they had \
                       filled is zeroed again";

/// The smallest alignment that any device asks for.
const SECTOR: usize = 512;

fn align(cx: &Context<'_>) -> Result<(), Stop> {
    cx.filled("file", b'o', 8 * P)?;
    let direct = cx.direct("file")?;
    let memory = Region::pages(4)?;
    memory.fill(0..4 * PAGE, b'o')?;
    for (offset, bytes) in [
        (100, 0..PAGE),
        (0, 0..100),
        (0, 1..PAGE + 1),
        (1, 0..PAGE),
        (0, 0..PAGE + 1),
    ] {
        for (direction, moved) in [
            (
                "read",
                direct.read(&memory.iov(bytes.clone()), At::Offset(offset), How::PLAIN),
            ),
            (
                "write",
                direct.write(&memory.iov(bytes.clone()), At::Offset(offset), How::PLAIN),
            ),
        ] {
            let what = if bytes.start == 0 {
                "unaligned"
            } else {
                "unaligned memory"
            };
            cx.check(what, moved == Err(Errno::EINVAL), || {
                format!("{direction} of bytes {bytes:?} at {offset}: {moved:?}")
            });
        }
    }
    let read = direct.read(&memory.iov(0..PAGE), At::Offset(P), How::PLAIN);
    cx.equal("aligned", read, Ok(PAGE));
    let read = direct.read(&memory.iov(0..0), At::Offset(1), How::PLAIN);
    cx.equal("nothing", read, Ok(0));
    // Memory in the middle of a page, where the device has sectors of that size.
    let read = direct.read(
        &memory.iov(SECTOR..SECTOR + PAGE),
        At::Offset(0),
        How::PLAIN,
    );
    match read {
        Err(Errno::EINVAL) => cx.note("memory has to be aligned to more than 512 bytes"),
        read => drop(cx.equal("memory aligned to 512 bytes", read, Ok(PAGE))),
    }
    cx.contents("contents", &*direct, 0..8 * P, b'o')?;
    Ok(())
}

fn eof_read(cx: &Context<'_>) -> Result<(), Stop> {
    let size = 3 * P + 100;
    pattern::file(cx, "file", 25, size)?;
    let direct = cx.direct("file")?;
    let memory = Region::pages(8)?;
    for (offset, want) in [
        (0, size as usize),
        (4 * P, 0),
        (3 * P + 512, 0),
        (3 * P, 100),
        (P, 2 * PAGE + 100),
        (1 << 30, 0),
    ] {
        memory.fill(0..8 * PAGE, b'u')?;
        let read = direct.read(&memory.iov(0..8 * PAGE), At::Offset(offset), How::PLAIN);
        cx.check("count", read == Ok(want), || {
            format!("{read:?} at {offset}, expected {want}")
        });
        let got = memory.to_vec(0..8 * PAGE)?;
        let right = pattern::bytes(25, offset..offset + want as u64);
        pattern::same(cx, "what was read", &got[..want], offset, &right);
        let block = want.next_multiple_of(PAGE);
        cx.all(
            "memory behind the last block",
            &got[block..],
            block as u64,
            b'u',
        );
    }
    direct.seek(0)?;
    let read = direct.read(&memory.iov(0..8 * PAGE), At::Position, How::PLAIN);
    cx.equal("by position", read, Ok(size as usize));
    cx.equal("position", direct.position()?, size);
    Ok(())
}

/// Makes eight pages, of which the last four are bad.
fn half_bad() -> Result<Region, Stop> {
    let memory = Region::pages(8)?;
    memory.fill(0..4 * PAGE, b'n')?;
    memory.protect(4 * PAGE..8 * PAGE, Protection::None)?;
    Ok(memory)
}

fn dio_prefix_read(cx: &Context<'_>) -> Result<(), Stop> {
    pattern::file(cx, "file", 27, 8 * P)?;
    let direct = cx.direct("file")?;
    let memory = half_bad()?;
    direct.seek(0)?;
    let read = direct.read(&memory.iov(0..8 * PAGE), At::Position, How::PLAIN);
    cx.check("count", read == Ok(4 * PAGE), || format!("{read:?}"));
    let moved = read.unwrap_or(0) as u64;
    cx.equal("position", direct.position()?, moved);
    let got = memory.to_vec(0..moved as usize)?;
    pattern::same(cx, "what was read", &got, 0, &pattern::bytes(27, 0..moved));
    let read = direct.read(&memory.iov(4 * PAGE..8 * PAGE), At::Offset(0), How::PLAIN);
    cx.equal("nothing but bad", read, Err(Errno::EFAULT));
    Ok(())
}

fn dio_prefix_write(cx: &Context<'_>) -> Result<(), Stop> {
    let memory = half_bad()?;
    for warm in [false, true] {
        // Inside the file, with what is there cached or not.
        let file = cx.filled("inside", b'o', 8 * P)?;
        let direct = cx.direct("inside")?;
        if warm {
            cx.contents("before", &*file, 0..8 * P, b'o')?;
        }
        let wrote = direct.write(&memory.iov(0..8 * PAGE), At::Offset(0), How::PLAIN);
        cx.check("count", wrote == Ok(4 * PAGE), || format!("{wrote:?}"));
        cx.equal("size", file.size()?, 8 * P);
        let cached = pattern::read(&*file, 0..8 * P)?;
        let stored = pattern::read(&*direct, 0..8 * P)?;
        pattern::same(cx, "cache and store agree", &cached, 0, &stored);
        let moved = wrote.unwrap_or(0);
        cx.all("what was written", &cached[..moved], 0, b'n');
        cx.all("what was not", &cached[4 * PAGE..], 4 * P, b'o');
        // Beyond its end.
        let file = cx.fresh("beyond")?;
        let direct = cx.direct("beyond")?;
        let wrote = direct.write(&memory.iov(0..8 * PAGE), At::Position, How::PLAIN);
        cx.check("count", wrote == Ok(4 * PAGE), || format!("{wrote:?}"));
        let moved = wrote.unwrap_or(0) as u64;
        cx.equal("size when extending", file.size()?, moved);
        cx.equal("position when extending", direct.position()?, moved);
        cx.contents("what was appended", &*file, 0..moved, b'n')?;
        file.truncate(8 * P)?;
        cx.contents("what was not, grown", &*file, moved..8 * P, 0)?;
    }
    let file = cx.filled("bad", b'o', 8 * P)?;
    let direct = cx.direct("bad")?;
    let wrote = direct.write(&memory.iov(4 * PAGE..8 * PAGE), At::Offset(0), How::PLAIN);
    cx.equal("nothing but bad", wrote, Err(Errno::EFAULT));
    cx.contents("unchanged", &*file, 0..8 * P, b'o')?;
    Ok(())
}

fn tail_zero(cx: &Context<'_>) -> Result<(), Stop> {
    let memory = half_bad()?;
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 50..1_000) {
        let file = cx.fresh("file")?;
        let direct = cx.direct("file")?;
        if round % 2 == 0 {
            // Blocks that are allocated hold what was there before, unless somebody zeroes them.
            cx.fill(&*file, b'x', 0..4 * P)?;
            file.sync()?;
            file.truncate(0)?;
        }
        let good = rng.random_range(1..8) * SECTOR;
        let at = rng.random_range(0..8) * SECTOR as u64;
        let end = if round % 4 < 2 { 4 * PAGE } else { 5 * PAGE };
        let start = 4 * PAGE - good;
        let wrote = direct.write(&memory.iov(start..end), At::Offset(at), How::PLAIN);
        let moved = match wrote {
            Err(Errno::EINVAL) => {
                return Err(Stop::Skip("blocks are larger than 512 bytes".into()));
            }
            Err(Errno::EFAULT) if end > 4 * PAGE => 0,
            wrote => wrote? as u64,
        };
        let size = file.size()?;
        let right = if moved == 0 { 0 } else { at + moved };
        cx.check("size", size == right, || {
            format!("{size} after {moved} bytes at {at}")
        });
        file.truncate(3 * P)?;
        file.drop_cache()?;
        cx.contents("before it zeros", &*file, 0..at, 0)?;
        cx.contents("what was written", &*file, at..at + moved, b'n')?;
        // What moved although the call failed may be there; older contents may not.
        let behind = pattern::read(&*file, at + moved..3 * P)?;
        let shown = if moved == 0 { good } else { 0 };
        let leftover = behind[shown.min(behind.len())..]
            .iter()
            .any(|&byte| byte != 0)
            || behind.iter().any(|&byte| byte != 0 && byte != b'n');
        cx.check("the rest zeros", !leftover, || {
            format!("{good} good bytes to {at}, {moved} moved")
        });
        round += 1;
    }
    Ok(())
}

fn hole_read_bad(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.fresh("file")?;
    file.truncate(8 * P)?;
    file.sync()?;
    let direct = cx.direct("file")?;
    let memory = half_bad()?;
    let read = direct.read(&memory.iov(0..8 * PAGE), At::Offset(0), How::PLAIN);
    cx.check("count", read == Ok(4 * PAGE), || format!("{read:?}"));
    let moved = read.unwrap_or(0);
    cx.all("zeros", &memory.to_vec(0..moved)?, 0, 0);
    let read = direct.read(&memory.iov(0..4 * PAGE), At::Offset(0), How::PLAIN);
    cx.equal("good memory", read, Ok(4 * PAGE));
    cx.all("zeros in good memory", &memory.to_vec(0..4 * PAGE)?, 0, 0);
    Ok(())
}

const ROUNDS: Range<u64> = 100..1_000;

fn dirty_then_dio_read(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.filled("file", b'o', 64 * P)?;
    let direct = cx.direct("file")?;
    let memory = Region::pages(16)?;
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, ROUNDS) {
        let pages = if round == 0 {
            1
        } else {
            rng.random_range(1..=16)
        };
        let (len, at) = (pages * PAGE, rng.random_range(0..=64 - pages as u64) * P);
        let range = || memory.iov(0..len);
        let letter = |base: u8| base + (round % 20) as u8;

        let q = letter(b'a');
        memory.fill(0..len, q)?;
        let wrote = file.write(&range(), At::Offset(at), How::PLAIN);
        cx.equal("buffered write", wrote, Ok(len));
        memory.fill(0..len, 0)?;
        let read = direct.read(&range(), At::Offset(at), How::PLAIN);
        cx.equal("direct read", read, Ok(len));
        cx.all(
            "direct read after a buffered write",
            &memory.to_vec(0..len)?,
            at,
            q,
        );

        let two = letter(b'A');
        memory.fill(0..len, two)?;
        let wrote = direct.write(&range(), At::Offset(at), How::PLAIN);
        cx.equal("direct write", wrote, Ok(len));
        memory.fill(0..len, 0)?;
        let read = file.read(&range(), At::Offset(at), How::PLAIN);
        cx.equal("buffered read", read, Ok(len));
        cx.all(
            "buffered read after a direct write",
            &memory.to_vec(0..len)?,
            at,
            two,
        );
        round += 1;
    }
    Ok(())
}
