//! A buffer that its owner gives away until the transfers over it have ended.
//!
//! *Owns*: the buffer, at one address, from the giving to the taking back.
//!
//! *Does not own*: the transfers; what they are over is a [`Segments`] like any other.
//!
//! *Locking*: none.
//!
//! ```text
//!  new ─► ours ── lend ─► lent ── every copy of the list gone ─► take_back
//!                          '── dropped: goes with the last copy of the list
//! ```

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::span::Segments;

/// A buffer and the right to it, which nobody else has.
pub struct Loan<B> {
    kept: Arc<Kept<B>>,
}

/// The buffer itself: kept by the loan and by every list over it.
struct Kept<B>(NonNull<B>);

// SAFETY: it owns its `B`, which may go to another thread; nobody gets a reference to it while it is shared (`lend`,
// `take_back`).
unsafe impl<B: Send> Send for Kept<B> {}
// SAFETY: as for Send: through a shared `Kept` nothing of the `B` can be reached.
unsafe impl<B: Send> Sync for Kept<B> {}

impl<B> fmt::Debug for Loan<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loan")
            .field("lent", &(Arc::strong_count(&self.kept) > 1))
            .finish_non_exhaustive()
    }
}

impl<B> Loan<B> {
    /// Takes a buffer over.
    #[must_use]
    pub fn new(buf: B) -> Self {
        // From here on it stays where it is: a buffer may have its bytes in itself.
        let buf = NonNull::from(Box::leak(Box::new(buf)));
        Self {
            kept: Arc::new(Kept(buf)),
        }
    }

    /// Waits until every list over the buffer is gone, and gives it back. Whoever has been told that the transfers have ended
    /// waits for microseconds at most.
    #[must_use]
    pub fn take_back(self) -> B {
        let mut kept = self.kept;
        loop {
            match Arc::try_unwrap(kept) {
                Ok(alone) => return alone.into_inner(),
                Err(shared) => kept = shared,
            }
            std::thread::yield_now();
        }
    }
}

impl<B: AsMut<[u8]> + Send + 'static> Loan<B> {
    /// Makes a list of the buffer's bytes, as it names them now. They are the list's until it and all its copies are gone; only
    /// the kernel, or raw copies, may access them.
    ///
    /// # Panics
    /// What [`AsMut::as_mut`] of the buffer panics with; when it is lent already.
    #[must_use]
    pub fn lend(&mut self) -> Segments {
        assert!(Arc::get_mut(&mut self.kept).is_some(), "lent already");
        // SAFETY: `new` leaked a box here, `Kept` is not shared (above), so this is the only reference.
        let buf = unsafe { &mut *self.kept.0.as_ptr() };
        let bytes: &mut [u8] = buf.as_mut();
        let (addr, len) = (bytes.as_mut_ptr(), bytes.len());
        // The addresses travel as numbers, to system calls.
        let _ = addr.expose_provenance();
        let mut segments = Segments::new(Arc::clone(&self.kept) as Arc<_>);
        // SAFETY: the bytes are borrowed from the buffer for as long as `kept` is shared: until then nobody makes another
        // reference to it (`lend` and `take_back` want it alone), and it is neither moved nor dropped.
        unsafe { segments.push_raw(addr, len) };
        segments
    }
}

impl<B> Kept<B> {
    fn into_inner(self) -> B {
        let kept = std::mem::ManuallyDrop::new(self);
        // SAFETY: leaked by `new`, and not given back before: `self` is consumed and its `Drop` does not run.
        *unsafe { Box::from_raw(kept.0.as_ptr()) }
    }
}

impl<B> Drop for Kept<B> {
    fn drop(&mut self) {
        // SAFETY: leaked by `new`, not taken back (`into_inner` does not come here), and nobody else's any more.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Bytes that move with the buffer.
    struct Inside([u8; 16], Arc<AtomicUsize>);

    impl AsMut<[u8]> for Inside {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }

    impl Drop for Inside {
        fn drop(&mut self) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn what_is_lent_stays_where_it_is_until_all_have_let_go() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let mut loan = Loan::new(Inside([7; 16], Arc::clone(&dropped)));
        let segments = loan.lend();
        let moved = Box::new(loan);
        assert_eq!(segments.copy_from(4, &[1, 2]), 2);
        let part = segments.slice(4, 4);
        drop(segments);
        assert_eq!(part.to_vec(), [1, 2, 7, 7]);
        let taker = std::thread::spawn(move || moved.take_back());
        for _ in 0..100 {
            std::thread::yield_now();
        }
        assert!(!taker.is_finished());
        drop(part);
        assert_eq!(taker.join().unwrap().0[4..8], [1, 2, 7, 7]);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_buffer_nobody_takes_back_goes_with_its_last_list() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let mut loan = Loan::new(Inside([7; 16], Arc::clone(&dropped)));
        let segments = loan.lend();
        drop(loan);
        assert_eq!(dropped.load(Ordering::SeqCst), 0);
        assert_eq!(segments.to_vec(), [7; 16]);
        drop(segments);
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
    }
}
