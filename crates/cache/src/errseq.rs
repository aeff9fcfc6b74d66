//! Write-back errors that every open file description sees exactly once (SEMANTICS.md section G).
//!
//! The word holds an error number, a SEEN bit and a counter that moves only when an error comes after the last one was
//! seen. Each open file keeps a sample; a sample that differs from the word is an error not yet reported there.

use pinfold_base::Errno;
use pinfold_base::sync::{AtomicU32, Ordering};

const ERRNO_BITS: u32 = 12;
const ERRNO_MASK: u32 = (1 << ERRNO_BITS) - 1;
const SEEN: u32 = 1 << ERRNO_BITS;
const COUNT_ONE: u32 = SEEN << 1;

/// A value of the word at some moment, kept per open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample(u32);

/// The last write-back error of a file.
#[derive(Debug)]
pub struct ErrSeq(AtomicU32);

impl Default for ErrSeq {
    fn default() -> Self {
        Self(AtomicU32::new(0))
    }
}

impl ErrSeq {
    /// Records an error.
    pub fn set(&self, errno: Errno) {
        // Error numbers end at 4095; anything else was never one.
        let number = u32::try_from(errno.raw()).unwrap_or(0) & ERRNO_MASK;
        let mut old = self.0.load(Ordering::Relaxed);
        loop {
            let mut new = (old & !(ERRNO_MASK | SEEN)) | number;
            if old & SEEN != 0 {
                new = new.wrapping_add(COUNT_ONE);
            }
            if new == old {
                return;
            }
            match self
                .0
                .compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => old = now,
            }
        }
    }

    /// Samples for a new open: an error that nobody has seen yet will be reported there as well.
    #[must_use]
    pub fn sample(&self) -> Sample {
        let now = self.0.load(Ordering::Acquire);
        Sample(if now & SEEN == 0 { 0 } else { now })
    }

    /// Tells whether there is an error newer than the sample, without marking it seen.
    #[must_use]
    pub fn is_newer(&self, since: Sample) -> bool {
        self.0.load(Ordering::Acquire) != since.0
    }

    /// Returns the error newer than `since`, if any, and moves `since` on. The caller serializes per open file.
    pub fn check_and_advance(&self, since: &mut Sample) -> Option<Errno> {
        let old = self.0.load(Ordering::Acquire);
        if old == since.0 {
            return None;
        }
        let new = old | SEEN;
        if new != old {
            // A failure means a newer error or a fellow who marked it first; either way ours is told now.
            let _ = self
                .0
                .compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed);
        }
        since.0 = new;
        match old & ERRNO_MASK {
            0 => None,
            number => Some(Errno::from_raw(number as i32)),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn t59_each_open_file_hears_of_an_error_once() {
        let errors = ErrSeq::default();
        let (mut a, mut b) = (errors.sample(), errors.sample());
        assert_eq!(errors.check_and_advance(&mut a), None);
        errors.set(Errno::EIO);
        let mut opened_before_seen = errors.sample();
        assert_eq!(errors.check_and_advance(&mut a), Some(Errno::EIO));
        assert_eq!(errors.check_and_advance(&mut a), None);
        assert_eq!(errors.check_and_advance(&mut b), Some(Errno::EIO));
        assert_eq!(errors.check_and_advance(&mut b), None);
        assert_eq!(
            errors.check_and_advance(&mut opened_before_seen),
            Some(Errno::EIO)
        );
        let mut opened_after_seen = errors.sample();
        assert_eq!(errors.check_and_advance(&mut opened_after_seen), None);
    }

    #[test]
    fn the_same_error_again_is_a_new_one_once_it_was_seen() {
        let errors = ErrSeq::default();
        let mut a = errors.sample();
        errors.set(Errno::ENOSPC);
        errors.set(Errno::ENOSPC);
        assert_eq!(errors.check_and_advance(&mut a), Some(Errno::ENOSPC));
        assert_eq!(errors.check_and_advance(&mut a), None);
        errors.set(Errno::ENOSPC);
        assert!(errors.is_newer(a));
        assert_eq!(errors.check_and_advance(&mut a), Some(Errno::ENOSPC));
    }
}
