//! Two pages of which the second is inaccessible, for this crate's tests.

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// Two pages, the second inaccessible.
pub(crate) struct Half(*mut u8);

impl Half {
    pub(crate) fn new() -> Self {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let addr = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                8192,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .unwrap()
        .cast::<u8>();
        // SAFETY: the second page of that mapping.
        unsafe { mprotect(addr.wrapping_add(4096).cast(), 4096, MprotectFlags::empty()) }.unwrap();
        Self(addr)
    }

    pub(crate) fn addr(&self) -> usize {
        self.0.expose_provenance()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.0
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, unused from here on.
        unsafe { munmap(self.0.cast(), 8192) }.unwrap();
    }
}
