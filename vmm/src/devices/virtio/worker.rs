//! The thread behind a device: one loop for all kinds of devices.
//!
//! It waits for queue notifications, the backend's own events and commands from the register file, and
//! calls the backend. While paused or inactive it only remembers what happened.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use virtio_queue::Queue;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    device::{DeviceContext, DeviceError, Progress, VirtioBackend},
    interrupt::Shared,
    queue::VirtQueue,
    state::{SavedQueue, VirtioError},
};
use crate::{
    memory::GuestRam,
    threads::{ThreadHook, ThreadKind},
};

/// The longest a command may take: draining a slow disk is the longest of them.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// Events taken from the kernel at once.
const EVENT_BATCH: usize = 16;

/// What a paused worker holds of the device's state.
pub(super) struct SavedWorker {
    /// The live queues; `None` while the driver has not set DRIVER_OK.
    pub(super) queues: Option<Vec<SavedQueue>>,
    pub(super) backend: Vec<u8>,
}

enum Command {
    Activate { queues: Vec<Queue>, features: u64, reply: SyncSender<()> },
    Reset(SyncSender<()>),
    StopQueue(usize, SyncSender<Result<(), String>>),
    Pause(SyncSender<Result<(), String>>),
    Resume(SyncSender<()>),
    Save(SyncSender<SavedWorker>),
    Restore(Vec<u8>, SyncSender<Result<(), String>>),
    Stop,
}

/// The register file's end of a worker. Dropping it stops the worker.
pub(super) struct WorkerHandle {
    device: &'static str,
    commands: Sender<Command>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    fn call<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, VirtioError> {
        let (reply, answer) = sync_channel(1);
        let gone = || VirtioError::WorkerGone { device: self.device };
        self.commands.send(command(reply)).map_err(|_| gone())?;
        self.wake.write(1).map_err(|_| gone())?;
        answer.recv_timeout(COMMAND_TIMEOUT).map_err(|e| match e {
            RecvTimeoutError::Disconnected => gone(),
            RecvTimeoutError::Timeout => {
                VirtioError::Timeout { device: self.device, waited: COMMAND_TIMEOUT }
            }
        })
    }

    pub(super) fn activate(&self, queues: Vec<Queue>, features: u64) -> Result<(), VirtioError> {
        self.call(|reply| Command::Activate { queues, features, reply })
    }

    pub(super) fn reset(&self) -> Result<(), VirtioError> {
        self.call(Command::Reset)
    }

    pub(super) fn stop_queue(&self, index: usize) -> Result<(), VirtioError> {
        self.drained(self.call(|reply| Command::StopQueue(index, reply))?)
    }

    pub(super) fn pause(&self) -> Result<(), VirtioError> {
        self.drained(self.call(Command::Pause)?)
    }

    pub(super) fn resume(&self) -> Result<(), VirtioError> {
        self.call(Command::Resume)
    }

    pub(super) fn save(&self) -> Result<SavedWorker, VirtioError> {
        self.call(Command::Save)
    }

    /// The inner error is the backend's reason to refuse.
    pub(super) fn restore(&self, backend: Vec<u8>) -> Result<Result<(), String>, VirtioError> {
        self.call(|reply| Command::Restore(backend, reply))
    }

    fn drained(&self, result: Result<(), String>) -> Result<(), VirtioError> {
        result.map_err(|reason| VirtioError::Drain { device: self.device, reason })
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        let told = self.commands.send(Command::Stop).is_ok() && self.wake.write(1).is_ok();
        if let Some(thread) = self.thread.take()
            && told
            && thread.join().is_err()
        {
            tracing::error!(device = self.device, "the device's worker had died");
        }
    }
}

/// What the driver set up.
struct Active {
    queues: Vec<VirtQueue>,
    features: u64,
    /// The device met something it cannot go on from: wait for the reset.
    broken: bool,
}

/// Event numbers as epoll returns them: queues from 0, the backend's from `BACKEND`, commands.
const BACKEND: u64 = 1 << 32;
const COMMANDS: u64 = 1 << 33;

pub(super) struct Worker {
    backend: Box<dyn VirtioBackend>,
    name: &'static str,
    ram: GuestRam,
    shared: Arc<Shared>,
    epoll: Epoll,
    notify: Vec<EventFd>,
    wake: EventFd,
    commands: Receiver<Command>,
    active: Option<Active>,
    paused: bool,
    /// Queues to work on, and events to handle, once that may be done.
    queue_pending: Vec<bool>,
    event_pending: Vec<bool>,
}

impl Worker {
    pub(super) fn start(
        backend: Box<dyn VirtioBackend>,
        ram: GuestRam,
        shared: Arc<Shared>,
        notify: &[EventFd],
        threads: &ThreadHook,
    ) -> Result<WorkerHandle, VirtioError> {
        let device = backend.name();
        let setup = |what| move |source| VirtioError::Setup { device, what, source };
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(setup("making an event descriptor"))?;
        let (sender, commands) = channel();
        let event_fds = backend.event_fds();
        let worker = Self {
            name: device,
            ram,
            shared,
            epoll: Epoll::new().map_err(setup("making an epoll descriptor"))?,
            notify: notify
                .iter()
                .map(EventFd::try_clone)
                .collect::<Result<_, _>>()
                .map_err(setup("duplicating an event descriptor"))?,
            wake: wake.try_clone().map_err(setup("duplicating an event descriptor"))?,
            commands,
            active: None,
            paused: true,
            queue_pending: vec![false; notify.len()],
            event_pending: vec![false; event_fds.len()],
            backend,
        };
        worker.watch(&event_fds).map_err(setup("watching the device's descriptors"))?;
        let hook = threads.clone();
        let thread = std::thread::Builder::new()
            .name(format!("virtio-{device}"))
            .spawn(move || match hook.begin(ThreadKind::Device) {
                Ok(()) => worker.run(),
                // Without its worker the device cannot be resumed: the guest does not run.
                Err(error) => tracing::error!(%error, device, "its thread cannot be confined"),
            })
            .map_err(setup("starting the worker thread"))?;
        Ok(WorkerHandle { device, commands: sender, wake, thread: Some(thread) })
    }

    fn watch(&self, event_fds: &[RawFd]) -> io::Result<()> {
        let add = |fd, events, token| {
            self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
        };
        add(self.wake.as_raw_fd(), EventSet::IN, COMMANDS)?;
        for (token, fd) in (0..).zip(&self.notify) {
            add(fd.as_raw_fd(), EventSet::IN, token)?;
        }
        for (token, fd) in (BACKEND..).zip(event_fds) {
            add(*fd, EventSet::IN | EventSet::EDGE_TRIGGERED, token)?;
        }
        Ok(())
    }

    fn run(mut self) {
        loop {
            let mut events = [EpollEvent::default(); EVENT_BATCH];
            let timeout = if self.has_work() { 0 } else { -1 };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, device = self.name, "device stops: epoll failed");
                    return self.backend.reset();
                }
            };
            for event in events.iter().take(count) {
                self.note(event.data());
            }
            while let Ok(command) = self.commands.try_recv() {
                if matches!(command, Command::Stop) {
                    return self.backend.reset();
                }
                self.execute(command);
            }
            self.work();
        }
    }

    /// Remembers an event.
    fn note(&mut self, token: u64) {
        if token == COMMANDS {
            // Commands are taken after every wait; an empty counter means one was.
            let _ = self.wake.read();
        } else if let Some(event) = token.checked_sub(BACKEND) {
            if let Some(pending) = self.event_pending.get_mut(event as usize) {
                *pending = true;
            }
        } else if let Some(fd) = self.notify.get(token as usize) {
            let _ = fd.read();
            self.queue_pending[token as usize] = true;
        }
    }

    fn runnable_queues(&self) -> bool {
        self.active.as_ref().is_some_and(|a| !a.broken)
    }

    fn runnable(&self) -> bool {
        !self.paused && self.runnable_queues()
    }

    fn has_work(&self) -> bool {
        self.runnable() && self.queue_pending.iter().chain(&self.event_pending).any(|p| *p)
    }

    /// Handles what is pending, once round.
    fn work(&mut self) {
        if !self.runnable() {
            return;
        }
        // What breaks the device on the way leaves the rest alone: it waits for the reset.
        for event in 0..self.event_pending.len() {
            if self.runnable()
                && std::mem::take(&mut self.event_pending[event])
                && let Some(Some(queue)) =
                    self.with_backend(|backend, ctx| backend.handle_event(event, ctx))
                && let Some(pending) = self.queue_pending.get_mut(queue)
            {
                *pending = true;
            }
        }
        for queue in 0..self.queue_pending.len() {
            if self.runnable() && std::mem::take(&mut self.queue_pending[queue]) {
                let again =
                    self.with_backend(|backend, ctx| process(backend, queue, ctx)).unwrap_or(false);
                self.queue_pending[queue] |= again;
            }
        }
    }

    /// Calls the backend, raises the interrupts that are due, and breaks the device on failure.
    fn with_backend<T>(
        &mut self,
        call: impl FnOnce(&mut dyn VirtioBackend, &mut DeviceContext<'_>) -> Result<T, DeviceError>,
    ) -> Option<T> {
        let result = self.try_backend(call);
        result.inspect_err(|error| self.shared.tell_breakdown(self.name, error)).ok()
    }

    fn try_backend<T>(
        &mut self,
        call: impl FnOnce(&mut dyn VirtioBackend, &mut DeviceContext<'_>) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let Some(active) = self.active.as_mut() else {
            return Err(DeviceError::Request("the device is not active"));
        };
        let mut ctx = DeviceContext {
            ram: &self.ram,
            queues: &mut active.queues,
            features: active.features,
            shared: &self.shared,
        };
        let mut result = call(self.backend.as_mut(), &mut ctx);
        for queue in &mut active.queues {
            match queue.take_interrupt(&self.ram) {
                Ok(true) => self.shared.interrupt.used(),
                Ok(false) => {}
                Err(error) => result = Err(error.into()),
            }
        }
        // What is stuck may still end; all else is beyond repair.
        let broken = matches!(&result, Err(error) if !matches!(error, DeviceError::Stuck { .. }));
        if broken && !active.broken {
            active.broken = true;
            self.shared.needs_reset.store(true, Ordering::Release);
            self.shared.interrupt.config();
        }
        result
    }

    fn execute(&mut self, command: Command) {
        // A caller that gave up waiting is the only reason for a reply to fail.
        match command {
            Command::Activate { queues, features, reply } => {
                self.activate(queues, features);
                let _ = reply.send(());
            }
            Command::Reset(reply) => {
                self.backend.reset();
                self.active = None;
                let _ = reply.send(());
            }
            Command::StopQueue(index, reply) => {
                let drained = self.drain();
                if let Some(queue) = self.active.as_mut().and_then(|a| a.queues.get_mut(index)) {
                    queue.stop();
                }
                let _ = reply.send(drained);
            }
            Command::Pause(reply) => {
                let drained = self.drain();
                self.paused = drained.is_ok();
                let _ = reply.send(drained);
            }
            Command::Resume(reply) => {
                self.paused = false;
                self.look_everywhere();
                let _ = reply.send(());
            }
            Command::Save(reply) => {
                let queues = self.active.as_ref().map(|active| {
                    active.queues.iter().map(|q| SavedQueue::of(q.inner())).collect()
                });
                let _ = reply.send(SavedWorker { queues, backend: self.backend.save() });
            }
            Command::Restore(state, reply) => {
                let _ = reply.send(self.backend.restore(&state));
            }
            Command::Stop => {}
        }
    }

    fn activate(&mut self, queues: Vec<Queue>, features: u64) {
        let queues = queues.into_iter().map(VirtQueue::new).collect();
        self.active = Some(Active { queues, features, broken: false });
        self.with_backend(|backend, ctx| backend.activate(ctx));
        self.look_everywhere();
    }

    /// Notifications and edges may have passed unseen: look at everything once.
    fn look_everywhere(&mut self) {
        self.queue_pending.fill(true);
        self.event_pending.fill(true);
    }

    /// Completes everything in flight. Requests of a device that only a reset can help are dropped:
    /// nobody will look at their results, and they must not keep the machine from being paused.
    fn drain(&mut self) -> Result<(), String> {
        if self.runnable_queues() {
            match self.try_backend(|backend, ctx| backend.drain(ctx)) {
                Ok(()) => return Ok(()),
                Err(error @ DeviceError::Stuck { .. }) => return Err(error.to_string()),
                Err(error) => self.shared.tell_breakdown(self.name, &error),
            }
        }
        self.backend.reset();
        Ok(())
    }
}

/// Works on a queue with the driver's notifications off; says whether to come back.
fn process(
    backend: &mut dyn VirtioBackend,
    index: usize,
    ctx: &mut DeviceContext<'_>,
) -> Result<bool, DeviceError> {
    let ram = ctx.ram;
    match ctx.queues.get_mut(index) {
        Some(queue) if queue.is_ready() => queue.quiet(ram)?,
        _ => return Ok(false),
    }
    match backend.process(index, ctx)? {
        Progress::Yield => Ok(true),
        Progress::Waiting => Ok(false),
        Progress::Drained => match ctx.queues.get_mut(index) {
            Some(queue) => Ok(queue.listen(ram)?),
            None => Ok(false),
        },
    }
}
