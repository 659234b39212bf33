//! The filters, in processes of their own: what they forbid cannot be taken back.

use std::{
    fs::File,
    net::TcpListener,
    process::{Command, Output},
};

use super::*;

/// Says to a test that it is the confined process.
const INSIDE: &str = "HOWDAH_TEST_INSIDE";

/// Runs the test `name` again in a process of its own, where [`is_inside`].
fn confined(name: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let name = format!("jail::tests::{name}");
    let mut command = Command::new(program);
    command.args(["--exact", &name, "--nocapture", "--test-threads", "1"]);
    command.env(INSIDE, "1").output().unwrap()
}

fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

fn refused(what: std::io::Result<impl Sized>) -> bool {
    what.is_err_and(|e| e.raw_os_error() == Some(libc::ENOSYS))
}

/// Maps a page that could be executed, and gives it back.
fn map_code() -> std::io::Result<()> {
    let access = libc::PROT_READ | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, which nobody else knows of.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: just mapped, and not referred to.
    unsafe { libc::munmap(page, 4096) };
    Ok(())
}

/// Without a path: where it is allowed it fails for another reason. (What `Command` does is fatal: it
/// blocks signals meanwhile, and the kernel ends who cannot be told.)
fn execute_nothing() -> std::io::Result<()> {
    // SAFETY: the kernel refuses to read from null.
    match unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn raw_socket() -> std::io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[test]
fn a_confined_process_starts_nothing_and_loads_nothing() {
    if !is_inside() {
        let ran = confined("a_confined_process_starts_nothing_and_loads_nothing");
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{said}");
        // Once, however often it was tried.
        let line = "howdah: jail: a thread tried system call 9, which is not allowed";
        assert_eq!(said.matches(line).count(), 1, "{said}");
        return;
    }
    enter_with_filters_only(&JailArgs::default()).unwrap();
    let check = || {
        assert!(refused(execute_nothing()));
        assert!(refused(map_code()) && refused(map_code()));
        assert!(refused(raw_socket()));
        File::open("/dev/null").unwrap();
        assert_eq!(std::thread::spawn(|| 1).join().unwrap(), 1);
    };
    check();
    TcpListener::bind("127.0.0.1:0").unwrap();
    confine(Kind::Handoff).unwrap();
    check();
    assert!(refused(TcpListener::bind("127.0.0.1:0")));
    // What a thread may not do, one that it starts may not do either.
    std::thread::spawn(check).join().unwrap();
    assert!(enter_with_filters_only(&JailArgs::default()).is_err(), "once is enough");
}

#[test]
fn a_thread_that_faces_the_guest_and_misbehaves_ends_the_process() {
    if !is_inside() {
        let ran = confined("a_thread_that_faces_the_guest_and_misbehaves_ends_the_process");
        let said = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(128 + libc::SIGSYS), "{said}");
        assert!(said.contains("a device thread tried system call 41"), "{said}");
        return;
    }
    enter_with_filters_only(&JailArgs::default()).unwrap();
    let device = std::thread::spawn(|| {
        confine(Kind::Device).unwrap();
        // What malloc does now and then: it gets nothing, and lives.
        let opened = File::open("/dev/null");
        assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EACCES));
        raw_socket()
    });
    let _ = device.join();
    unreachable!("the process has ended");
}

#[test]
fn without_a_jail_nothing_is_refused() {
    if !is_inside() {
        let ran = confined("without_a_jail_nothing_is_refused");
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        return;
    }
    enter_with_filters_only(&JailArgs { no_jail: true, run_as: None }).unwrap();
    confine(Kind::Vcpu).unwrap();
    assert!(Command::new("/bin/true").status().unwrap().success());
}
