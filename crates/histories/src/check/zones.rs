//! Linearizability of one register whose written values all differ.
//!
//! After Gibbons and Korach, *Testing Shared Memories* (SIAM Journal on Computing 26, 1997): the calls of a value form a
//! cluster. One of them ends at `first_end`, first of all, and one begins at `last_start`, last of all. A cluster has to
//! come before another if its first end lies before the other's last start. A history is linearizable if every value
//! that was read was written, no read ended before its write began, and no two clusters have to come before each other.
//! Sorted by time, that takes one pass.
//!
//! *Owns*: that decision, and the calls that show why not.
//!
//! *Does not own*: which calls count ([`super`]).
//!
//! *Locking*: none.

/// A call, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// What was written or read; zero before the first write.
    pub value: u64,
    /// When it was begun.
    pub start: u64,
    /// When it has taken effect at the latest; `u64::MAX` if at any time.
    pub end: u64,
    /// Whether it is a write.
    pub write: bool,
    /// Whether it has taken effect; a write that has not been answered may not have.
    pub sure: bool,
    /// Which call it is, for the caller.
    pub call: u32,
}

/// Why there is no order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A value was read that nobody wrote.
    NeverWritten,
    /// Two writes put the same value: the history is no good.
    WrittenTwice,
    /// The calls contradict each other.
    Order,
}

/// Calls that no order explains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contradiction {
    /// Why.
    pub why: Why,
    /// The calls, few; without any of them (and the reads of its value, for a write) the others can be explained.
    pub ops: Vec<Op>,
}

/// The calls of one value.
#[derive(Debug, Clone, Copy)]
struct Cluster {
    write: Option<Op>,
    /// A read, if the write alone need not have happened.
    proof: Option<Op>,
    first_end: Op,
    last_start: Op,
}

impl Cluster {
    /// Tells whether the register has this value all the time between two moments.
    const fn is_forward(&self) -> bool {
        self.first_end.end < self.last_start.start
    }

    const fn before(&self, other: &Self) -> bool {
        self.first_end.end < other.last_start.start
    }

    fn ops(&self) -> impl Iterator<Item = Op> {
        let ends = [Some(self.first_end), Some(self.last_start)];
        ends.into_iter().chain([self.proof, self.write]).flatten()
    }
}

/// The call that put zero into every register.
const MADE: Op = Op {
    value: 0,
    start: 0,
    end: 0,
    write: true,
    sure: true,
    call: u32::MAX,
};

/// Sorts the calls of one register by value, and returns some that no order explains.
#[must_use]
pub fn contradiction(ops: &mut [Op]) -> Option<Contradiction> {
    let mut found = first(ops)?;
    if found.why == Why::Order {
        minimise(&mut found.ops);
    }
    Some(found)
}

fn first(ops: &mut [Op]) -> Option<Contradiction> {
    ops.sort_unstable_by_key(|op| (op.value, !op.write));
    let mut forward = Vec::new();
    let mut backward = Vec::new();
    for same in ops.chunk_by(|a, b| a.value == b.value) {
        match cluster(same) {
            Ok(Some(cluster)) if cluster.is_forward() => forward.push(cluster),
            Ok(Some(cluster)) => backward.push(cluster),
            Ok(None) => {}
            Err(found) => return Some(found),
        }
    }
    forward.sort_unstable_by_key(|cluster| cluster.first_end.end);
    // They must not overlap: each that passes leaves the next to look at its neighbour alone.
    for pair in forward.windows(2) {
        if let [a, b] = pair
            && b.before(a)
        {
            return Some(between(a, b));
        }
    }
    for one in &backward {
        let after = forward.partition_point(|cluster| cluster.first_end.end < one.last_start.start);
        if let Some(last) = after.checked_sub(1).and_then(|last| forward.get(last))
            && one.before(last)
        {
            return Some(between(last, one));
        }
    }
    None
}

/// Makes the cluster of one value; `None` if nothing need have happened.
fn cluster(same: &[Op]) -> Result<Option<Cluster>, Contradiction> {
    let writes = same.iter().take_while(|op| op.write).count();
    let because = |why, ops: &[Op]| {
        Err(Contradiction {
            why,
            ops: ops.to_vec(),
        })
    };
    let (write, reads) = match same {
        [one, ..] if one.value == 0 && writes == 0 => (MADE, same),
        [write, reads @ ..] if writes == 1 && write.value != 0 => (*write, reads),
        [one, ..] if writes == 0 => return because(Why::NeverWritten, &[*one]),
        _ => return because(Why::WrittenTwice, same.get(..2).unwrap_or(same)),
    };
    if reads.is_empty() && !write.sure {
        return Ok(None);
    }
    let (mut first_end, mut last_start) = (write, write);
    for read in reads {
        if read.end < write.start {
            return because(Why::Order, &[write, *read]);
        }
        if read.end < first_end.end {
            first_end = *read;
        }
        if read.start > last_start.start {
            last_start = *read;
        }
    }
    Ok(Some(Cluster {
        write: (write != MADE).then_some(write),
        proof: reads.first().filter(|_| !write.sure).copied(),
        first_end,
        last_start,
    }))
}

fn between(a: &Cluster, b: &Cluster) -> Contradiction {
    let mut ops: Vec<Op> = Vec::new();
    for op in a.ops().chain(b.ops()) {
        if op != MADE && !ops.contains(&op) {
            ops.push(op);
        }
    }
    Contradiction {
        why: Why::Order,
        ops,
    }
}

/// Leaves out what the contradiction does not need.
fn minimise(ops: &mut Vec<Op>) {
    let mut at = 0;
    while let Some(&candidate) = ops.get(at) {
        let needed = candidate.write
            && ops
                .iter()
                .any(|op| !op.write && op.value == candidate.value);
        let mut rest: Vec<Op> = ops.clone();
        rest.remove(at);
        if !needed && first(&mut rest.clone()).is_some() {
            *ops = rest;
        } else {
            at += 1;
        }
    }
}
