//! Two pages of which the second is inaccessible, and processes of their own, for this crate's tests.

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

/// Runs the calling test, `name` with its modules, again in a process of its own, where limits, rights and handlers can be
/// changed; as `uid` if given. True there, and the test goes on; false here, where it has succeeded there.
pub(crate) fn alone(name: &str, uid: Option<u32>) -> bool {
    use std::os::unix::process::CommandExt;
    const MARK: &str = "PINFOLD_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .current_dir("/");
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    let passed = String::from_utf8_lossy(&output.stdout).contains("1 passed");
    assert!(passed, "there is no test {name}");
    false
}
