//! Which system calls a thread of the VM's process may make, by what the thread is for.
//!
//! ```text
//! vCPU  ⊂  device  ⊂  handoff  ⊂  main
//! ```
//!
//! Each kind may do what the one before may, and more. A thread inherits what its maker may not do,
//! and any kind may start those before it, so this order is also what makes it work: a vCPU's thread is
//! made by the one that receives or resumes the guest. Main is what the whole process is held to.
//!
//! What no kind may do, whatever bytes reach it: start a program or a process, become somebody else,
//! look into another process, load code (memory that is made executable), mount, or make a socket
//! of other kinds than Unix and TCP/IP.

use libc::{
    SYS_accept4, SYS_access, SYS_bind, SYS_brk, SYS_chmod, SYS_clock_getres, SYS_clock_gettime,
    SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close, SYS_connect, SYS_copy_file_range,
    SYS_dup, SYS_dup2, SYS_dup3, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait,
    SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_faccessat, SYS_faccessat2, SYS_fadvise64,
    SYS_fallocate, SYS_fchmod, SYS_fchmodat, SYS_fcntl, SYS_fdatasync, SYS_flock, SYS_fstat,
    SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getcwd, SYS_getdents64, SYS_getegid,
    SYS_geteuid, SYS_getgid, SYS_getpeername, SYS_getpid, SYS_getppid, SYS_getpriority,
    SYS_getrandom, SYS_getrusage, SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_gettimeofday,
    SYS_getuid, SYS_io_uring_enter, SYS_io_uring_register, SYS_io_uring_setup, SYS_ioctl, SYS_kill,
    SYS_linkat, SYS_listen, SYS_lseek, SYS_madvise, SYS_membarrier, SYS_mkdir, SYS_mkdirat,
    SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_openat,
    SYS_pipe2, SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2, SYS_prlimit64,
    SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readlink, SYS_readlinkat, SYS_readv,
    SYS_recvfrom, SYS_recvmsg, SYS_rename, SYS_renameat, SYS_renameat2, SYS_restart_syscall,
    SYS_rmdir, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_rt_sigtimedwait, SYS_sched_getaffinity, SYS_sched_yield, SYS_seccomp, SYS_sendfile,
    SYS_sendmmsg, SYS_sendmsg, SYS_sendto, SYS_set_robust_list, SYS_setpriority, SYS_setsockopt,
    SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_socketpair, SYS_stat, SYS_statfs, SYS_statx,
    SYS_symlinkat, SYS_sysinfo, SYS_tgkill, SYS_time, SYS_timerfd_create, SYS_timerfd_settime,
    SYS_uname, SYS_unlink, SYS_unlinkat, SYS_write, SYS_writev,
};
use seccompiler::{SeccompCmpArgLen as Width, SeccompCmpOp as Is, SeccompCondition, SeccompRule};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Runs a virtual CPU: the guest talks to it directly.
    Vcpu,
    /// Works on a virtio device's queues: reads what the guest wrote there.
    Device,
    /// Builds, moves, saves or records the machine, with all threads that it starts: reads what a peer
    /// sent, and what is in files.
    Handoff,
    /// All else: commands, the console's log, signals.
    Main,
}

impl Kind {
    /// From the one that may least.
    pub(super) const ALL: [Self; 4] = [Self::Vcpu, Self::Device, Self::Handoff, Self::Main];

    /// Whether the guest's own bytes are this thread's work: one that then does what it never
    /// should is no longer to be trusted with anything.
    pub(super) fn faces_the_guest(self) -> bool {
        self <= Self::Device
    }

    /// For messages: a few bytes of ASCII. Threads that others start are not told apart.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "a vCPU thread",
            Self::Device => "a device thread",
            Self::Handoff | Self::Main => "a thread",
        }
    }
}

/// Calls that are harmless with any arguments: of their memory, their time, their end.
const VCPU: &[i64] = &[
    SYS_brk,
    SYS_clock_getres,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_getrandom,
    SYS_gettid,
    SYS_gettimeofday,
    SYS_madvise,
    SYS_membarrier,
    SYS_mremap,
    SYS_munmap,
    SYS_nanosleep,
    SYS_restart_syscall,
    SYS_rseq,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_set_robust_list,
    SYS_sigaltstack,
    SYS_time,
    // Event descriptors and the log.
    SYS_write,
    SYS_writev,
];

/// Files and queues that are open already.
const DEVICE: &[i64] = &[
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_epoll_wait,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_fsync,
    // Rings are restricted to what they were made for (uring::Ring).
    SYS_io_uring_enter,
    SYS_lseek,
    SYS_poll,
    SYS_ppoll,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_read,
    SYS_readv,
    // Timers that are there already: announcing again, rates.
    SYS_timerfd_settime,
];

/// Files by name, in what is the process's root; sockets; threads; new rings.
const HANDOFF: &[i64] = &[
    SYS_access,
    SYS_chmod,
    SYS_connect,
    SYS_copy_file_range,
    SYS_dup,
    SYS_dup2,
    SYS_dup3,
    SYS_epoll_create1,
    SYS_eventfd2,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fadvise64,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fcntl,
    SYS_flock,
    SYS_fstat,
    SYS_fstatfs,
    SYS_ftruncate,
    SYS_getcwd,
    SYS_getdents64,
    SYS_getegid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getpeername,
    SYS_getppid,
    SYS_getrusage,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_getuid,
    SYS_io_uring_register,
    SYS_io_uring_setup,
    SYS_linkat,
    SYS_mkdir,
    SYS_mkdirat,
    SYS_newfstatat,
    SYS_openat,
    SYS_pipe2,
    SYS_readlink,
    SYS_readlinkat,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_rmdir,
    SYS_rt_sigaction,
    // Only narrows what the thread may do.
    SYS_seccomp,
    SYS_sendfile,
    SYS_sendmmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_setsockopt,
    SYS_shutdown,
    SYS_socketpair,
    SYS_stat,
    SYS_statfs,
    SYS_statx,
    SYS_symlinkat,
    SYS_sysinfo,
    SYS_timerfd_create,
    SYS_uname,
    SYS_unlink,
    SYS_unlinkat,
];

/// Who may be talked to from outside, and who hears signals.
const MAIN: &[i64] = &[SYS_accept4, SYS_bind, SYS_listen, SYS_rt_sigtimedwait];

/// A set of system calls: a number, and the rules of which one must hold; none means always.
pub(super) type Calls = std::collections::BTreeMap<i64, Vec<SeccompRule>>;
type Rules = Result<Vec<SeccompRule>, seccompiler::BackendError>;

/// What a thread of this kind may do, in the process `pid`.
pub(super) fn of(kind: Kind, pid: u32) -> Result<Calls, seccompiler::BackendError> {
    let plain = Kind::ALL.iter().zip([VCPU, DEVICE, HANDOFF, MAIN]).filter(|(of, _)| **of <= kind);
    let mut calls: Calls =
        plain.flat_map(|(_, calls)| calls).map(|call| (*call, Vec::new())).collect();
    calls.insert(SYS_mmap, vec![not_executable()?]);
    calls.insert(SYS_mprotect, vec![not_executable()?]);
    calls.insert(SYS_ioctl, ioctls(kind)?);
    if kind.faces_the_guest() {
        // Passed on to the filter of what is denied: a call that this one did not let pass would end the process.
        calls.extend(denied());
    }
    if kind == Kind::Device {
        // Looked at before a descriptor is closed, by some builds of the standard library.
        calls.insert(SYS_fcntl, only(1, &[libc::F_GETFD, libc::F_GETFL])?);
    }
    if kind >= Kind::Handoff {
        let thread = libc::CLONE_THREAD as u64;
        calls.insert(SYS_prctl, only(0, &[libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS])?);
        // How nice a thread is: workers give way to the guest.
        let mine = libc::PRIO_PROCESS.into();
        for call in [SYS_getpriority, SYS_setpriority] {
            calls.insert(call, vec![rule(0, Is::Eq, mine)?]);
        }
        // Threads, no processes.
        calls.insert(SYS_clone, vec![rule(0, Is::MaskedEq(thread), thread)?]);
        // Answered as if the kernel did not have it: its flags are where no filter can look.
        calls.insert(SYS_clone3, Vec::new());
        calls.insert(SYS_socket, Vec::new());
        // Signals to its own threads, and to itself.
        calls.insert(SYS_tgkill, vec![rule(0, Is::Eq, pid.into())?]);
        calls.insert(SYS_kill, vec![rule(0, Is::Eq, pid.into())?]);
        // To ask for a limit, not to set one.
        let none = SeccompCondition::new(2, Width::Qword, Is::Eq, 0)?;
        calls.insert(SYS_prlimit64, vec![SeccompRule::new(vec![none])?]);
    }
    Ok(calls)
}

/// What a thread that faces the guest is answered with EACCES, silently: it opens nothing, but glibc's
/// malloc may try to. The first time that it gives memory of a thread's arena back, it looks into
/// /proc/sys/vm/overcommit_memory (`check_may_shrink_heap`), and does without where it cannot.
pub(super) fn denied() -> Calls {
    [(SYS_openat, Vec::new())].into()
}

/// What glibc tries and can do without: answered with ENOSYS, silently.
pub(super) fn absent() -> Result<Calls, seccompiler::BackendError> {
    let allowed = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    let other = allowed
        .into_iter()
        .map(|family| SeccompCondition::new(0, Width::Dword, Is::Ne, family as u64))
        .collect::<Result<_, _>>()?;
    Ok([(SYS_clone3, Vec::new()), (SYS_socket, vec![SeccompRule::new(other)?])].into())
}

fn rule(argument: u8, is: Is, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, Width::Dword, is, value)?])
}

/// One rule for each value that the argument may have.
fn only<T: Copy + Into<i64>>(argument: u8, values: &[T]) -> Rules {
    values
        .iter()
        .map(|value| rule(argument, Is::Eq, (*value).into() as u64 & 0xffff_ffff))
        .collect()
}

fn not_executable() -> Result<SeccompRule, seccompiler::BackendError> {
    rule(2, Is::MaskedEq(libc::PROT_EXEC as u64), 0)
}

// Of linux/kvm.h and linux/fs.h.
const KVM_RUN: i64 = 0xae80;
const KVM_GET_REGS: i64 = 0x8090_ae81;
const KVM_GET_SREGS: i64 = 0x8138_ae83;
const PAGEMAP_SCAN: i64 = 0xc060_6610;
const FICLONE: i64 = 0x4004_9409;
/// The byte of a request that says whose it is, and KVM's.
const WHOSE: u64 = 0xff00;
const KVM: u64 = 0xae00;

fn ioctls(kind: Kind) -> Rules {
    let mut rules = only(1, &[KVM_RUN, KVM_GET_REGS, KVM_GET_SREGS])?;
    if kind >= Kind::Device {
        rules.extend(only(1, &[PAGEMAP_SCAN])?);
    }
    if kind >= Kind::Handoff {
        rules.push(rule(1, Is::MaskedEq(WHOSE), KVM)?);
        let others = [libc::FIONBIO, libc::FIOCLEX, libc::TCGETS, libc::TIOCGWINSZ];
        rules.extend(only(1, &others.map(|request| request as i64))?);
        rules.extend(only(1, &[FICLONE])?);
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_may_what_the_one_before_may() {
        for pair in Kind::ALL.windows(2) {
            let [less, more] = [pair[0], pair[1]].map(|kind| of(kind, 1).unwrap());
            for (call, rules) in &less {
                let wider = more.get(call).unwrap_or_else(|| panic!("{call} of {:?}", pair[0]));
                let covered = wider.is_empty() || rules.iter().all(|rule| wider.contains(rule));
                assert!(covered && (!rules.is_empty() || wider.is_empty()), "{call}");
            }
            assert!(more.len() > less.len());
        }
    }

    #[test]
    fn nobody_may_become_anything_else() {
        let all = of(Kind::Main, 1).unwrap();
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_pivot_root,
            libc::SYS_chroot,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_setuid,
            libc::SYS_setgid,
            libc::SYS_capset,
            libc::SYS_bpf,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_keyctl,
            libc::SYS_add_key,
            libc::SYS_tkill,
            libc::SYS_rt_sigqueueinfo,
            libc::SYS_init_module,
            libc::SYS_kexec_load,
            libc::SYS_open_by_handle_at,
            libc::SYS_memfd_create,
            libc::SYS_pkey_mprotect,
            libc::SYS_personality,
        ] {
            assert!(!all.contains_key(&call), "system call {call}");
        }
        // And these not with any arguments.
        for call in [SYS_mmap, SYS_mprotect, SYS_clone, SYS_ioctl, SYS_prctl, SYS_kill, SYS_tgkill]
        {
            assert!(!all[&call].is_empty(), "system call {call}");
        }
    }

    #[test]
    fn who_faces_the_guest_opens_and_connects_nothing() {
        let device = of(Kind::Device, 1).unwrap();
        for call in [SYS_socket, SYS_connect, SYS_clone, SYS_io_uring_setup] {
            assert!(!device.contains_key(&call), "system call {call}");
        }
        assert!(denied().contains_key(&SYS_openat));
        assert!(!of(Kind::Vcpu, 1).unwrap().contains_key(&SYS_read));
    }
}
