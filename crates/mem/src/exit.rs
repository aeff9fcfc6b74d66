//! Work to be done when the process ends by `exit` or by returning from `main`.

use parking_lot::Mutex;

type Work = Box<dyn Fn() + Send>;

/// Each with the process it was registered in.
static WORK: Mutex<Vec<(u32, Work)>> = Mutex::new(Vec::new());
static REGISTERED: std::sync::Once = std::sync::Once::new();

/// Runs `work` at the end of this process, and not at that of a forked child, which has the memory but none of the threads the
/// work may wait for. It should cost nothing once it has lost its purpose: it is never taken back.
pub fn at_exit(work: Work) {
    REGISTERED.call_once(|| {
        extern "C" fn run() {
            // A thread that exits while another registers must not hang the exit.
            if let Some(work) = WORK.try_lock_for(std::time::Duration::from_secs(1)) {
                let me = std::process::id();
                for (_, work) in work
                    .iter()
                    .filter(|(registered_in, _)| *registered_in == me)
                {
                    work();
                }
            }
        }
        // SAFETY: registers a function without arguments that does not unwind out: its work is caught by nobody, and a
        // panic in an extern "C" function aborts a process that is ending anyway.
        unsafe { libc::atexit(run) };
    });
    WORK.lock().push((std::process::id(), work));
}
