//! One virtual CPU, and the thread that runs it.
//!
//! A vCPU that runs belongs to its thread; one that does not belongs to its machine. Starting moves
//! it into a thread, stopping joins the thread and takes it back, so there is no vCPU that is both
//! being run and being looked at.

use std::{
    io,
    os::unix::thread::JoinHandleExt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, Once, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc::Sender,
    },
    thread::{self, JoinHandle},
};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{
    devices::bus::Bus,
    threads::{ThreadHook, ThreadKind},
    throttle::Brake,
};

/// What a machine tells its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The guest turned itself off.
    Shutdown,
    /// The guest asked to start over, or met a triple fault.
    Reset,
    /// The machine cannot go on.
    Fault(String),
}

/// What every vCPU of a machine shares.
#[derive(Clone)]
pub(crate) struct RunContext {
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) halt: Halt,
    pub(crate) brake: Arc<Brake>,
    pub(crate) threads: ThreadHook,
}

/// How a guest ends: once, and its owner is told.
#[derive(Clone)]
pub(crate) struct Halt {
    events: Sender<VmEvent>,
    /// Set once the guest has turned itself off or cannot go on: no vCPU runs after that.
    halted: Arc<AtomicBool>,
}

impl RunContext {
    /// A context without devices.
    pub(crate) fn new(events: Sender<VmEvent>, threads: ThreadHook) -> Self {
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let halt = Halt { events, halted: Arc::default() };
        Self { ports, mmio, halt, brake: Arc::default(), threads }
    }
}

impl Halt {
    /// Whether the guest has ended.
    pub(crate) fn is_halted(&self) -> bool {
        self.halted.load(Ordering::Acquire)
    }

    /// Ends the guest and tells the owner why, once.
    pub(crate) fn now(&self, event: VmEvent) {
        if !self.halted.swap(true, Ordering::AcqRel) {
            // An owner that dropped its receiver does not want to know.
            let _ = self.events.send(event);
        }
    }
}

/// A virtual CPU that is not running.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) id: u8,
    pub(crate) fd: VcpuFd,
}

/// The page through which KVM and user space talk about one vCPU.
struct RunPage(*mut kvm_run);

// SAFETY: the page stays mapped as long as the vCPU's `VcpuFd` lives, and a `RunPage` is dropped
// before it (`VcpuThread` holds both). Fields are accessed one by one: `immediate_exit` atomically
// from any thread, the others only by the thread that runs the vCPU.
unsafe impl Send for RunPage {}

impl RunPage {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(fd.get_kvm_run())
    }

    /// Makes KVM_RUN return at once with EINTR, after it has completed a pending exit; or not.
    fn set_immediate_exit(&self, exit: bool) {
        // SAFETY: the page is mapped (see above) and the field is a byte that both the kernel and
        // this program access as such.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0).immediate_exit) };
        flag.store(exit.into(), Ordering::Release);
    }

    /// Width of the port access that the last exit was for.
    fn port_width(&self) -> usize {
        // SAFETY: the page is mapped, the union is plain data, and only the thread that runs the
        // vCPU calls this, right after an exit that filled in `io`.
        usize::from(unsafe { (*self.0).__bindgen_anon_1.io.size })
    }
}

/// Holds vCPU threads before their first instruction, until all is there that the guest needs.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    go: Mutex<Option<bool>>,
    changed: Condvar,
}

impl Gate {
    /// Lets the guest run.
    pub(crate) fn open(&self) {
        self.decide(true);
    }

    /// Sends the threads back: not one instruction of the guest runs.
    pub(crate) fn call_off(&self) {
        self.decide(false);
    }

    fn decide(&self, go: bool) {
        *self.go.lock().unwrap_or_else(PoisonError::into_inner) = Some(go);
        self.changed.notify_all();
    }

    fn wait(&self) -> bool {
        let mut go = self.go.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *go {
                Some(go) => return go,
                None => go = self.changed.wait(go).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// A virtual CPU that runs, or waits at its [`Gate`].
#[derive(Debug)]
pub(crate) struct VcpuThread {
    thread: JoinHandle<Vcpu>,
    stop: Arc<AtomicBool>,
    page: RunPage,
}

impl std::fmt::Debug for RunPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RunPage")
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Interrupting KVM_RUN is all that the signal is for.
}

fn kick_signal() -> libc::c_int {
    static REGISTERED: Once = Once::new();
    let signal = SIGRTMIN();
    REGISTERED.call_once(|| {
        if let Err(error) = register_signal_handler(signal, on_kick) {
            // SIGRTMIN is valid and may be handled, so this cannot happen.
            tracing::error!(%error, "cannot handle the signal that stops vCPUs");
        }
    });
    signal
}

impl VcpuThread {
    /// Starts a vCPU's thread, which waits at the gate. If the host gives no thread, the vCPU comes
    /// back.
    pub(crate) fn start(
        mut vcpu: Vcpu,
        context: RunContext,
        gate: Arc<Gate>,
    ) -> Result<Self, (Vcpu, io::Error)> {
        kick_signal();
        let stop = Arc::new(AtomicBool::new(false));
        let page = RunPage::of(&mut vcpu.fd);
        page.set_immediate_exit(false);
        // The vCPU goes through a slot that outlives a failed spawn.
        let slot = Arc::new(std::sync::Mutex::new(Some(vcpu)));
        let (theirs, id_stop) = (slot.clone(), stop.clone());
        let spawned = thread::Builder::new().name("vcpu".into()).spawn(move || {
            let taken = theirs.lock().ok().and_then(|mut slot| slot.take());
            // The slot is filled until this one thread takes it.
            let Some(mut vcpu) = taken else { unreachable!("a vCPU is started once") };
            let confined = context.threads.begin(ThreadKind::Vcpu);
            if !gate.wait() {
                return vcpu;
            }
            if let Err(error) = confined {
                let fault = format!("vCPU {}: its thread cannot be confined: {error}", vcpu.id);
                context.halt.now(VmEvent::Fault(fault));
                return vcpu;
            }
            let run = AssertUnwindSafe(|| vcpu.run(&context, &id_stop));
            if catch_unwind(run).is_err() {
                context.halt.now(VmEvent::Fault(format!("vCPU {}: the VMM panicked", vcpu.id)));
            }
            vcpu
        });
        match spawned {
            Ok(thread) => Ok(Self { thread, stop, page }),
            Err(error) => {
                let vcpu = slot.lock().ok().and_then(|mut slot| slot.take());
                let Some(vcpu) = vcpu else { unreachable!("no thread took the vCPU") };
                Err((vcpu, error))
            }
        }
    }

    /// Asks the vCPU to stop. Returns at once.
    pub(crate) fn request_stop(&self) {
        // The order matters: whenever the vCPU comes out of KVM_RUN because of the flag or the
        // signal, it sees `stop`; and the flag closes the window between its last look at `stop`
        // and KVM_RUN.
        self.stop.store(true, Ordering::Release);
        self.page.set_immediate_exit(true);
        if let Err(error) = self.thread.kill(kick_signal()) {
            // Only a thread that has ended already cannot be signalled.
            tracing::debug!(%error, "vCPU thread has ended by itself");
        }
    }

    /// By what its thread can be interrupted, until it is joined.
    pub(crate) fn kick_handle(&self) -> KickHandle {
        KickHandle(self.thread.as_pthread_t())
    }

    /// Waits until the vCPU has stopped, with no access to a device half done, and takes it back.
    pub(crate) fn join(self) -> Vcpu {
        match self.thread.join() {
            Ok(vcpu) => vcpu,
            // The thread catches panics around everything that may panic.
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// A vCPU's thread, to be interrupted while it has not been joined.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KickHandle(libc::pthread_t);

impl KickHandle {
    /// Makes the vCPU come out of KVM, if it is in there.
    ///
    /// # Safety
    ///
    /// The [`VcpuThread`] that it is of has not been joined.
    pub(crate) unsafe fn kick(self) {
        // SAFETY: a thread that has not been joined may be signalled, also if it has ended; the
        // signal has a handler.
        unsafe { libc::pthread_kill(self.0, kick_signal()) };
    }
}

enum After {
    GoOn,
    Halted,
}

impl Vcpu {
    /// Runs until asked to stop or until the guest has ended.
    ///
    /// KVM_RUN returns EINTR only after it has completed the access of the exit before, so leaving
    /// there leaves nothing half done.
    fn run(&mut self, context: &RunContext, stop: &AtomicBool) {
        let page = RunPage::of(&mut self.fd);
        loop {
            context.brake.wait(stop);
            if context.halt.is_halted() {
                return;
            }
            match self.fd.run() {
                Ok(exit) => {
                    if let After::Halted = handle(exit, &page, context, self.id) {
                        self.report_fault();
                        return;
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {
                    if stop.load(Ordering::Acquire) {
                        return;
                    }
                }
                // A vCPU that waits for its first start-up interrupt.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => {
                    let fault = format!("vCPU {}: KVM_RUN: {error}", self.id);
                    context.halt.now(VmEvent::Fault(fault));
                    return;
                }
            }
        }
    }

    /// Logs where the vCPU was, for the person who has to find out. After a shutdown that the CPU
    /// itself met, KVM has put it back to the reset vector (0xfff0): there is nothing to see then.
    fn report_fault(&self) {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else { return };
        tracing::warn!(
            vcpu = self.id,
            rip = format_args!("{:#x}", regs.rip),
            rsp = format_args!("{:#x}", regs.rsp),
            rflags = format_args!("{:#x}", regs.rflags),
            cs = format_args!("{:#x}", sregs.cs.selector),
            gs_base = format_args!("{:#x}", sregs.gs.base),
            cr2 = format_args!("{:#x}", sregs.cr2),
            cr3 = format_args!("{:#x}", sregs.cr3),
            "the guest cannot go on",
        );
    }
}

fn handle(exit: VcpuExit<'_>, page: &RunPage, context: &RunContext, id: u8) -> After {
    match exit {
        VcpuExit::IoIn(port, data) => {
            // String instructions bring many accesses of one width at once.
            for unit in data.chunks_mut(page.port_width().max(1)) {
                context.ports.read(port.into(), unit);
            }
        }
        VcpuExit::IoOut(port, data) => {
            for unit in data.chunks(page.port_width().max(1)) {
                context.ports.write(port.into(), unit);
            }
        }
        VcpuExit::MmioRead(address, data) => {
            context.mmio.read(address, data);
        }
        VcpuExit::MmioWrite(address, data) => {
            context.mmio.write(address, data);
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt => {}
        VcpuExit::Shutdown => {
            tracing::warn!(vcpu = id, "triple fault");
            context.halt.now(VmEvent::Reset);
            return After::Halted;
        }
        other => {
            context.halt.now(VmEvent::Fault(format!("vCPU {id}: {other:x?}")));
            return After::Halted;
        }
    }
    After::GoOn
}
