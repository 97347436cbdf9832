//! Signals. Ctrl-C, and SIGTERM alike: commands with something to leave in order ask for it; all others end at once. A closed pipe ends those that
//! print, and none that serves. A file that is too large for the system ends none.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::failure::{Failure, Result, Status};
use crate::ui::tell;

/// What an interrupt does: it ends the process, is noted, or has been noted.
static STATE: AtomicU8 = AtomicU8::new(AT_ONCE);
const AT_ONCE: u8 = 0;
const GRACEFUL: u8 = 1;
const INTERRUPTED: u8 = 2;

/// What people are told at an interrupt that is noted.
static NOTE: Mutex<Option<&str>> = Mutex::new(None);

/// Watches for SIGINT and SIGTERM on a thread of its own. A second one always ends the process.
pub(crate) fn watch() {
    let watcher = || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            while signalled().await.is_ok() {
                if !change(GRACEFUL, INTERRUPTED) {
                    std::process::exit(130);
                }
                if let Some(note) = NOTE.lock().ok().and_then(|note| *note) {
                    tell(note);
                }
            }
        });
    };
    // Without the thread signals keep their usual effect.
    let _ = std::thread::Builder::new().name("interrupt".to_owned()).spawn(watcher);
}

/// Waits for SIGINT or SIGTERM.
///
/// # Errors
/// Signals that cannot be watched for.
pub(crate) async fn signalled() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            interrupt = tokio::signal::ctrl_c() => interrupt,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// From here on an interrupt only sets the flag that [`interrupted`] reads.
pub(crate) fn handle_gracefully() {
    change(AT_ONCE, GRACEFUL);
}

/// Has people told `note` at an interrupt while `work` runs, which may take long to see it.
pub(crate) fn noting<T>(note: &'static str, work: impl FnOnce() -> T) -> T {
    let set = |to| {
        if let Ok(mut note) = NOTE.lock() {
            *note = to;
        }
    };
    set(Some(note));
    let result = work();
    set(None);
    result
}

/// What was to be left in order is: an interrupt ends the process again.
pub(crate) fn end_at_once() {
    change(GRACEFUL, AT_ONCE);
}

/// As [`handle_gracefully`] while `work` runs. After an interrupt that is the result, whatever `work` returned.
pub(crate) fn gracefully<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    handle_gracefully();
    let result = work();
    end_at_once();
    if interrupted() { Err(Failure::new(Status::Interrupted, "interrupted")) } else { result }
}

/// Whether the user asked to stop.
pub(crate) fn interrupted() -> bool {
    STATE.load(Ordering::Relaxed) == INTERRUPTED
}

/// Whether it was the state `from`, which is `to` then.
fn change(from: u8, to: u8) -> bool {
    STATE.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

/// A closed pipe ends the process silently, as it does other command-line programs, instead of a panic in `println!`.
pub(crate) fn end_on_broken_pipe() {
    #[cfg(unix)]
    set(libc::SIGPIPE, libc::SIG_DFL);
}

/// A file that would become larger than the system lets it (`ulimit -f`) is an error of its write, which names it, and nothing else.
pub(crate) fn survive_file_size_limit() {
    #[cfg(unix)]
    set(libc::SIGXFSZ, libc::SIG_IGN);
}

/// From here on a closed pipe is an error of its write and nothing else: a peer that goes away must not end a process with others.
pub(crate) fn survive_broken_pipe() {
    #[cfg(unix)]
    set(libc::SIGPIPE, libc::SIG_IGN);
}

/// The same, while `work` runs.
pub(crate) fn surviving_broken_pipe<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(unix)]
    let before = set(libc::SIGPIPE, libc::SIG_IGN);
    let result = work();
    #[cfg(unix)]
    set(libc::SIGPIPE, before);
    result
}

/// Sets what a signal does, its default or nothing, and tells what it did before.
#[cfg(unix)]
fn set(signal: libc::c_int, action: libc::sighandler_t) -> libc::sighandler_t {
    // SAFETY: neither needs a handler, and no other action is set anywhere for the signals of this module.
    unsafe { libc::signal(signal, action) }
}
