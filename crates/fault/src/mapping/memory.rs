//! A mapping as memory that calls are given: copied by the library's own addresses, pinned, brought in.
//!
//! *Owns*: what of a range can be lent or pinned at once, and why not the rest ([`MappedMemory`]).
//!
//! *Does not own*: how a fault is served (the module above), the rounds of whoever copies (`pinfold`).
//!
//! *Locking*: as of [`MappedMemory`]: nothing is held when memory is brought in; lending locks one folio at a time.

use pinfold_base::PAGE_SIZE;
use pinfold_base::rank::rule_zero;
use pinfold_cache::{MapOutcome, PinKind, PinRefusal, Want};
use pinfold_mem::{
    Access, Delivery, Lent, MappedMemory, PinStop, PinnedPart, SignalVerdict, UserMapKind,
};

use super::{PAGE, UserMapping};
use crate::slots::{Answer, Request, Waiter};

impl MappedMemory for UserMapping {
    fn signal_fault(&self, addr: usize, access: Access) -> SignalVerdict {
        if self.channel.delivery() != Delivery::Inline {
            // The pool has refused this one.
            return SignalVerdict::NotOurs;
        }
        rule_zero("a fault in mapped memory");
        let counters = &self.shared.counters;
        counters.note(access);
        let served = match self.try_serve(addr, access, false, true) {
            Some(MapOutcome::Mapped) => true,
            Some(MapOutcome::BeyondEnd) => false,
            None => {
                counters.faults_handed_over.bump();
                let request = Request {
                    addr,
                    access,
                    protected: false,
                    waiter: Waiter::Slot,
                };
                self.shared.slots.call(request) == Answer::Served
            }
        };
        if served {
            return SignalVerdict::Resolved;
        }
        counters.faults_refused.bump();
        SignalVerdict::NotOurs
    }

    fn with_lent(
        &self,
        addr: usize,
        len: usize,
        access: Access,
        copy: &mut dyn FnMut(*mut u8, usize) -> usize,
    ) -> Lent {
        if access == Access::Write && self.map.kind() == UserMapKind::SharedRead {
            return Lent::Fatal;
        }
        let mut done = 0;
        while done < len {
            let at = (addr + done) % PAGE;
            let want = (PAGE - at).min(len - done);
            let Some(page) = self.map.page_at(addr + done) else {
                break;
            };
            if self.is_known_beyond(page) {
                return if done > 0 {
                    Lent::Done(done)
                } else {
                    Lent::Fatal
                };
            }
            let moved = match access {
                _ if self.is_private() => None,
                Access::Read => self.lend_read(page, at, want, copy),
                Access::Write => self.lend_write(page, at, want, copy),
            };
            match moved {
                None if done == 0 => return Lent::NeedFault,
                None => break,
                Some(moved) => {
                    done += moved;
                    if moved < want {
                        break;
                    }
                }
            }
        }
        Lent::Done(done)
    }

    fn pin(&self, addr: usize, len: usize, access: Access) -> PinnedPart {
        let kind = match access {
            Access::Read => PinKind::Read,
            Access::Write => PinKind::Write,
        };
        match (self.map.kind(), kind) {
            (UserMapKind::Private, _) => return PinnedPart::none(PinStop::Private),
            (UserMapKind::SharedRead, PinKind::Write) => {
                return PinnedPart::none(PinStop::Forbidden);
            }
            (UserMapKind::SharedRead | UserMapKind::SharedWrite, _) => {}
        }
        let Some(first) = self.map.page_at(addr) else {
            return PinnedPart::none(PinStop::Cold);
        };
        let at = addr % PAGE;
        let there = (self.map.addr() + self.map.len() - addr).min(len);
        let behind = first + (at + there).div_ceil(PAGE) as u64;
        let allowed = if self.target.knows_end() {
            behind.min(self.pages().end().div_ceil(PAGE_SIZE))
        } else {
            behind
        };
        let (run, refusal) = self.pages().try_pin_run(first..allowed, kind);
        let mut segments = self.pages().segments();
        run.push(&mut segments, at, there);
        let stop = match refusal {
            Some(PinRefusal::Cold) => Some(PinStop::Cold),
            Some(PinRefusal::TooMany) => Some(PinStop::TooMany),
            None if allowed < behind => Some(PinStop::Forbidden),
            None => (there < len).then_some(PinStop::Cold),
        };
        PinnedPart {
            segments,
            pins: Box::new(run),
            stop,
        }
    }

    fn fault_in(&self, addr: usize, len: usize, access: Access) -> usize {
        rule_zero("fault-in of mapped memory");
        if access == Access::Write && self.map.kind() == UserMapKind::SharedRead {
            return len;
        }
        let mut done = 0;
        while done < len {
            let at = (addr + done) % PAGE;
            let Some(page) = self.map.page_at(addr + done) else {
                break;
            };
            if self.is_known_beyond(page) {
                break;
            }
            let outcome = match access {
                // A store to a private mapping does not concern the file, whose page the kernel copies.
                Access::Write if !self.is_private() => self.target.make_writable(page),
                Access::Read | Access::Write => {
                    let want = Want {
                        pages: ((at + len - done).div_ceil(PAGE)) as u64,
                        ahead: Some(self.walks.at(page)),
                        nowait: false,
                    };
                    self.target.make_readable(page, &want)
                }
            };
            if !matches!(outcome, Ok(MapOutcome::Mapped)) {
                break;
            }
            done += PAGE - at;
        }
        len - done.min(len)
    }
}

impl UserMapping {
    /// Lends the page's bytes for a load; they may be stored to meanwhile, as mapped bytes may.
    fn lend_read(
        &self,
        page: u64,
        at: usize,
        len: usize,
        copy: &mut dyn FnMut(*mut u8, usize) -> usize,
    ) -> Option<usize> {
        let found = self.pages().get(page)?;
        Some(copy(found.addr().wrapping_add(at), len))
    }

    /// Lends the page's bytes for a store. Only a page that is dirty, and stays so: nobody has to be told.
    fn lend_write(
        &self,
        page: u64,
        at: usize,
        len: usize,
        copy: &mut dyn FnMut(*mut u8, usize) -> usize,
    ) -> Option<usize> {
        let folio = self.pages().try_lock_dirty(page)?;
        Some(copy(folio.addr().wrapping_add(at), len))
    }
}
