//! One request under way: its pieces, what each came to, and the outcome of the whole.
//!
//! Touched by one ring thread only.

use pinfold_base::{Errno, PAGE_SIZE, Progress};
use smallvec::SmallVec;

use super::{FIXED_RUN_MIN, FRAGMENTS_MAX, Op, PIECE_BYTES_MAX, RETRY_MAX, Request};
use crate::span::Segments;

/// The registered prefix of an arena.
#[derive(Debug, Clone, Copy)]
pub(super) struct Registered {
    pub base: usize,
    pub chunk_bytes: usize,
    pub bytes: usize,
}

impl Registered {
    pub const NONE: Self = Self {
        base: 0,
        chunk_bytes: 1,
        bytes: 0,
    };

    /// Returns the chunk that holds `addr` and how many of `len` bytes it holds from there.
    fn chunk_of(&self, addr: usize, len: usize) -> Option<(u16, usize)> {
        let at = addr.checked_sub(self.base).filter(|&at| at < self.bytes)?;
        let chunk = at / self.chunk_bytes;
        let end = ((chunk + 1) * self.chunk_bytes).min(self.bytes);
        Some((u16::try_from(chunk).ok()?, len.min(end - at)))
    }
}

/// A part of a request that one submission carries.
#[derive(Debug)]
pub(super) struct Piece {
    /// First byte, counted from the request's.
    pub from: usize,
    pub len: usize,
    pub done: usize,
    stop: Option<Errno>,
    /// The fixed buffer, for a piece that lies in one.
    pub buffer: Option<u16>,
    retries: u32,
    /// Where the rest of the piece lies in memory; rebuilt when the piece is submitted, left alone until it completes.
    pub fragments: SmallVec<[libc::iovec; 2]>,
}

/// What a completion means for its piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The piece has ended.
    Ended,
    /// A short transfer: submit the rest.
    Continue,
    /// A transient refusal: submit again.
    Retry,
}

impl Piece {
    pub fn new(from: usize, len: usize, buffer: Option<u16>) -> Self {
        Self {
            from,
            len,
            done: 0,
            stop: None,
            buffer,
            retries: 0,
            fragments: SmallVec::new(),
        }
    }

    /// Lists the memory of what is not done yet.
    pub fn gather(&mut self, segments: &Segments) {
        self.fragments.clear();
        fragments(
            segments,
            self.from + self.done,
            self.len - self.done,
            |addr, len| {
                self.fragments.push(libc::iovec {
                    iov_base: addr as *mut libc::c_void,
                    iov_len: len,
                });
            },
        );
    }

    /// Takes in what a system call returned: bytes, or a negative error number.
    pub fn settle(&mut self, op: Op, block: u32, result: i32) -> Verdict {
        match usize::try_from(result) {
            Ok(bytes) => {
                self.done += bytes.min(self.len - self.done);
                if self.done == self.len {
                    return Verdict::Ended;
                }
                match op {
                    Op::Read if bytes == 0 || !bytes.is_multiple_of(block.max(1) as usize) => {
                        Verdict::Ended
                    }
                    // A write that moves nothing and gives no reason would be tried for ever.
                    Op::Write if bytes == 0 => self.fail(Errno::EIO),
                    Op::Read | Op::Write => Verdict::Continue,
                }
            }
            Err(_) => {
                let errno = Errno::from_raw(-result);
                let transient = errno == Errno::EINTR || errno == Errno::EAGAIN;
                if transient && self.retries < RETRY_MAX {
                    self.retries += 1;
                    return Verdict::Retry;
                }
                self.fail(errno)
            }
        }
    }

    /// Returns the error that ended the piece.
    pub fn stop(&self) -> Option<Errno> {
        self.stop
    }

    fn fail(&mut self, errno: Errno) -> Verdict {
        self.stop = Some(errno);
        Verdict::Ended
    }
}

/// Visits bytes `from .. from + len` of `segments` as (address, length), in order.
fn fragments(segments: &Segments, from: usize, len: usize, mut visit: impl FnMut(usize, usize)) {
    let (mut skip, mut left) = (from, len);
    for span in segments.spans() {
        if left == 0 {
            break;
        }
        if skip >= span.len() {
            skip -= span.len();
            continue;
        }
        let n = (span.len() - skip).min(left);
        visit(span.as_ptr() as usize + skip, n);
        skip = 0;
        left -= n;
    }
}

/// Cuts a request's memory into pieces: a fixed buffer for each long registered run (and for a request that is one run,
/// however short), one vector for the fragments between them.
pub(super) fn cut(segments: &Segments, registered: Registered) -> SmallVec<[Piece; 1]> {
    let mut pieces: SmallVec<[Piece; 1]> = SmallVec::new();
    let sole = segments.spans().len() == 1;
    let mut at = 0;
    let mut fragments_last = 0;
    fragments(segments, 0, segments.bytes(), |mut addr, mut len| {
        while len > 0 {
            // A cut inside a block would make an unaligned transfer of an aligned one.
            let chunk = registered
                .chunk_of(addr, len)
                .filter(|&(_, n)| n == len || n.is_multiple_of(PAGE_SIZE as usize));
            let (buffer, n) = match chunk {
                Some((buffer, n)) if n >= FIXED_RUN_MIN || (sole && n == len) => (Some(buffer), n),
                // Short of the chunk's border: what follows may be worth a fixed buffer.
                Some((_, n)) => (None, n),
                None => (None, len),
            };
            let n = n.min(PIECE_BYTES_MAX);
            let joins = pieces.last().is_some_and(|last| {
                buffer.is_none()
                    && last.buffer.is_none()
                    && fragments_last < FRAGMENTS_MAX
                    && last.len + n <= PIECE_BYTES_MAX
            });
            match pieces.last_mut() {
                Some(last) if joins => {
                    last.len += n;
                    fragments_last += 1;
                }
                _ => {
                    pieces.push(Piece::new(at, n, buffer));
                    fragments_last = 1;
                }
            }
            at += n;
            addr += n;
            len -= n;
        }
    });
    pieces
}

/// A request whose pieces are being carried out.
#[derive(Debug)]
pub(super) struct Flight {
    pub request: Request,
    pub pieces: SmallVec<[Piece; 1]>,
    pub left: usize,
}

impl Flight {
    pub fn new(request: Request, registered: Registered) -> Self {
        let pieces = cut(&request.segments, registered);
        Self {
            request,
            left: pieces.len(),
            pieces,
        }
    }

    /// Counts the pieces that name a fixed buffer.
    pub fn fixed_pieces(&self) -> usize {
        self.pieces.iter().filter(|p| p.buffer.is_some()).count()
    }

    /// Returns the outcome: the bytes up to the first piece that stopped or met the end of the file.
    pub fn outcome(&self) -> Progress<Errno> {
        let mut done = 0;
        for piece in &self.pieces {
            done += piece.done as u64;
            if let Some(stop) = piece.stop {
                return Progress::stopped(done, stop);
            }
            if piece.done < piece.len {
                break;
            }
        }
        Progress::complete(done)
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;
    use std::sync::Arc;

    use super::*;
    use crate::span::AlignedBuf;

    const PAGE: usize = 4096;

    fn spread(buf: &Arc<AlignedBuf>, parts: &[(usize, usize)]) -> Segments {
        let mut segments = Segments::new(Arc::clone(buf) as Arc<dyn Any + Send + Sync>);
        for &(at, len) in parts {
            assert!(at + len <= buf.len());
            // SAFETY: inside `buf`, which `segments` keeps.
            unsafe { segments.push_raw(buf.as_ptr().wrapping_add(at), len) };
        }
        segments
    }

    fn shape(pieces: &[Piece]) -> Vec<(usize, usize, Option<u16>)> {
        pieces.iter().map(|p| (p.from, p.len, p.buffer)).collect()
    }

    #[test]
    fn a_fixed_piece_never_crosses_a_chunk_border() {
        let buf = Arc::new(AlignedBuf::zeroed(1 << 20));
        let registered = Registered {
            base: buf.as_ptr() as usize,
            chunk_bytes: 256 << 10,
            bytes: 512 << 10,
        };
        let all = spread(&buf, &[(0, 1 << 20)]);
        assert_eq!(
            shape(&cut(&all, registered)),
            [
                (0, 256 << 10, Some(0)),
                (256 << 10, 256 << 10, Some(1)),
                (512 << 10, 512 << 10, None)
            ]
        );
        let page = spread(&buf, &[(256 << 10, PAGE)]);
        assert_eq!(shape(&cut(&page, registered)), [(0, PAGE, Some(1))]);
    }

    #[test]
    fn short_fragments_travel_in_one_vector_up_to_its_limit() {
        let buf = Arc::new(AlignedBuf::zeroed(2 * 1100 * PAGE));
        let parts: Vec<_> = (0..1100).map(|i| (2 * i * PAGE, PAGE)).collect();
        let segments = spread(&buf, &parts);
        let mut pieces = cut(&segments, Registered::NONE);
        assert_eq!(
            shape(&pieces),
            [
                (0, FRAGMENTS_MAX * PAGE, None),
                (FRAGMENTS_MAX * PAGE, 76 * PAGE, None)
            ]
        );
        pieces[1].done = 100;
        pieces[1].gather(&segments);
        assert_eq!(pieces[1].fragments.len(), 76);
        assert_eq!(pieces[1].fragments[0].iov_len, PAGE - 100);
    }

    #[test]
    fn a_short_read_goes_on_at_a_block_border_and_ends_elsewhere() {
        let mut piece = Piece::new(0, 8192, None);
        assert_eq!(piece.settle(Op::Read, 512, 1024), Verdict::Continue);
        assert_eq!(piece.settle(Op::Read, 512, 100), Verdict::Ended);
        assert_eq!((piece.done, piece.stop), (1124, None));
        let mut piece = Piece::new(0, 8192, None);
        assert_eq!(piece.settle(Op::Read, 1, 100), Verdict::Continue);
        assert_eq!(piece.settle(Op::Read, 1, 0), Verdict::Ended);
        let mut piece = Piece::new(0, 8192, None);
        assert_eq!(piece.settle(Op::Write, 1, 0), Verdict::Ended);
        assert_eq!(piece.stop, Some(Errno::EIO));
    }

    #[test]
    fn what_lies_behind_a_stopped_or_short_piece_does_not_count() {
        let buf = Arc::new(AlignedBuf::zeroed(3 * PAGE));
        let file = Arc::new(std::os::fd::OwnedFd::from(tempfile::tempfile().unwrap()));
        let outcome = |results: [i32; 3]| {
            let mut flight = Flight {
                request: Request {
                    op: Op::Read,
                    file: Arc::clone(&file),
                    offset: 0,
                    segments: Segments::of_buf(&buf, 3 * PAGE),
                    block: 512,
                    done: Box::new(|_| {}),
                },
                pieces: (0..3).map(|i| Piece::new(i * PAGE, PAGE, None)).collect(),
                left: 3,
            };
            for (piece, result) in flight.pieces.iter_mut().zip(results) {
                piece.settle(Op::Read, 512, result);
            }
            flight.outcome()
        };
        let page = PAGE as i32;
        assert_eq!(outcome([page; 3]), Progress::complete(3 * PAGE as u64));
        assert_eq!(outcome([page, 100, page]), Progress::complete(4196));
        assert_eq!(
            outcome([page, -libc::EIO, -libc::EFAULT]),
            Progress::stopped(4096, Errno::EIO)
        );
        assert_eq!(outcome([0, page, -libc::EIO]), Progress::complete(0));
    }

    #[test]
    fn transient_refusals_are_retried_within_the_bound() {
        let mut piece = Piece::new(0, 512, None);
        for _ in 0..RETRY_MAX {
            assert_eq!(piece.settle(Op::Read, 512, -libc::EAGAIN), Verdict::Retry);
        }
        assert_eq!(piece.settle(Op::Read, 512, -libc::EAGAIN), Verdict::Ended);
        assert_eq!(piece.stop, Some(Errno::EAGAIN));
    }
}
