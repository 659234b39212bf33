//! What becomes of a system call that a filter does not allow.
//!
//! It is never made. The kernel sends the thread SIGSYS instead, and the handler says on stderr (the
//! VM's log) which call it was. On a thread that faces the guest it then ends the process: such a thread
//! has done what no path of this program does, and no word of it can be trusted any more. On any other
//! the call fails with ENOSYS, as on a kernel that does not have it: a library that was
//! updated and tries something new must not cost a guest. (A thread that has SIGSYS blocked, as glibc has while it
//! starts a program, cannot be told: then the kernel ends the process.)

use std::{
    cell::Cell,
    io,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::calls::Kind;

/// What a shell says of a process that SIGSYS ended.
const EXIT: libc::c_int = 128 + libc::SIGSYS;
/// System calls have numbers below this.
const CALLS: usize = 1024;

thread_local! {
    /// What the thread is for. No destructor and no lazy start: a signal handler may look.
    static KIND: Cell<Kind> = const { Cell::new(Kind::Main) };
}

/// Says what this thread is for.
pub(super) fn this_thread_is(kind: Kind) {
    KIND.set(kind);
}

/// Handles SIGSYS from now on, on every thread.
pub(super) fn handle() -> io::Result<()> {
    let handler = SigHandler::SigAction(on_forbidden_call);
    let action = SigAction::new(handler, SaFlags::SA_ONSTACK, SigSet::empty());
    // SAFETY: the handler calls nothing that a signal handler may not call.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

/// `siginfo_t` of a SIGSYS (linux/signal.h), which libc does not have.
#[repr(C)]
struct SigSys {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    _pad: libc::c_int,
    address: *mut libc::c_void,
    call: libc::c_int,
    arch: libc::c_uint,
}

/// Of linux/seccomp.h.
const SYS_SECCOMP: libc::c_int = 1;

extern "C" fn on_forbidden_call(
    _: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO, which nix sets, a siginfo of at least this
    // size (it has 128 bytes), laid out so for SIGSYS.
    let (code, call) = unsafe {
        let info = info.cast::<SigSys>();
        ((*info).code, (*info).call)
    };
    let kind = KIND.get();
    if code != SYS_SECCOMP {
        // Somebody sent the signal: as it would have ended the process without a handler.
        // SAFETY: ends the process, and runs nothing of it on the way.
        unsafe { libc::_exit(EXIT) };
    }
    if is_new(call) || kind.faces_the_guest() {
        tell(kind, call);
    }
    if kind.faces_the_guest() {
        // SAFETY: as above.
        unsafe { libc::_exit(EXIT) };
    }
    // SAFETY: the third argument is the interrupted thread's ucontext, which is nobody else's; what is
    // written is the register in which the system call would have returned.
    unsafe {
        let context = context.cast::<libc::ucontext_t>();
        (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::ENOSYS);
    }
}

/// Whether this call was not told of before: one line for each.
fn is_new(call: libc::c_int) -> bool {
    static TOLD: [AtomicU64; CALLS / 64] = [const { AtomicU64::new(0) }; CALLS / 64];
    let Ok(call) = usize::try_from(call) else { return false };
    let Some(word) = TOLD.get(call / 64) else { return false };
    word.fetch_or(1 << (call % 64), Ordering::Relaxed) & 1 << (call % 64) == 0
}

/// Writes a line to stderr, without anything that a signal handler must not use.
fn tell(kind: Kind, call: libc::c_int) {
    let mut line = Line::default();
    line.push(b"howdah: jail: ");
    line.push(kind.name().as_bytes());
    line.push(b" tried system call ");
    line.push_number(call.unsigned_abs());
    line.push(match kind.faces_the_guest() {
        true => b", which it never needs: the process ends here\n",
        false => b", which is not allowed: it fails (--no-jail runs without)\n",
    });
    // SAFETY: the pointer and length are those of initialised bytes.
    let _ = unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
}

/// A line on the stack. What does not fit is left out.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 160], len: 0 }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.len).zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn push_number(&mut self, mut number: u32) {
        let mut digits = [b'0'; 10];
        let mut first = digits.len();
        for (at, digit) in digits.iter_mut().enumerate().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
            first = at;
            if number == 0 {
                break;
            }
        }
        self.push(digits.get(first..).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_once_and_cut_off() {
        assert!(is_new(1023) && !is_new(1023) && !is_new(1024) && !is_new(-1));
        let mut line = Line::default();
        for number in [0, 7, 10, u32::MAX] {
            line.push_number(number);
            line.push(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"0 7 10 4294967295 ");
        line.push(&[b'x'; 500]);
        assert_eq!(line.len, line.bytes.len());
    }
}
