//! Direct I/O: T41.

use std::ops::Range;

use pinfold_base::Errno;
use pinfold_mem::region::{At, Region};
use rand::Rng as _;

use super::{P, PAGE};
use crate::fs::{How, Open};
use crate::scenario::{Context, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    number: "T41",
    name: "dirty_then_dio_read",
    claim: "direct reads see buffered writes and buffered reads see direct writes, at once",
    known: &[],
    seconds_max: 60,
    run: dirty_then_dio_read,
}];

const ROUNDS: Range<u64> = 100..1_000;

fn dirty_then_dio_read(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.filled("file", b'o', 64 * P)?;
    let direct = match cx.fs().open("file", Open::EXISTING.direct()) {
        Err(Errno::EINVAL) => return Err(Stop::Skip("O_DIRECT is refused here".into())),
        opened => opened?,
    };
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
