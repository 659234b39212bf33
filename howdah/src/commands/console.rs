//! `howdah vm console`: this terminal as the guest's serial console.

use std::{
    io::{self, IsTerminal, Read, Write},
    net::Shutdown,
};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::{
    control::{Reply, Request, client},
    failure::{Exit, Failure},
    home::VmDir,
    output::Output,
};

/// Ctrl-]: leaves the console, as telnet does.
const LEAVE: u8 = 0x1d;

/// Attaches until the user leaves, input ends, or the VM's process ends.
pub(crate) fn attach(dir: &VmDir, output: Output) -> anyhow::Result<()> {
    let mut channel = client::ask(dir, Request::Console, None)?;
    match client::next_reply(dir, &mut channel)? {
        Reply::Attached => {}
        Reply::Failed(failure) => return Err(failure.into()),
        _ => anyhow::bail!("VM {}: its process did not attach the console", dir.name()),
    }
    channel.set_timeout(None)?;
    let (shown, stream) = channel.into_stream();
    output.note(&format!("console of VM {}; Ctrl-] leaves", dir.name()));
    let raw = RawTerminal::enter()?;
    let typed = stream.try_clone()?;
    // Not joined: a read of the terminal cannot be ended from here. The process ends it.
    std::thread::spawn(move || {
        let _ = send_typed(&typed);
        let _ = typed.shutdown(Shutdown::Both);
    });
    let ended = show(&shown, &stream);
    drop(raw);
    output.note("");
    ended.map_err(|e| {
        Failure::new(Exit::Failed, format!("console of VM {}", dir.name()), e, "attach again")
            .into()
    })
}

fn show(first: &[u8], mut stream: &std::os::unix::net::UnixStream) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(first)?;
    let mut buffer = [0; 4096];
    loop {
        stdout.flush()?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => stdout.write_all(buffer.get(..count).unwrap_or_default())?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Sends what is typed until the key that leaves. At the end of a piped input, what the guest says
/// is still shown: a script may wait for it.
fn send_typed(mut to: &std::os::unix::net::UnixStream) -> io::Result<()> {
    let mut stdin = io::stdin().lock();
    let mut buffer = [0; 256];
    loop {
        let count = stdin.read(&mut buffer)?;
        if count == 0 {
            loop {
                std::thread::park();
            }
        }
        let typed = buffer.get(..count).unwrap_or_default();
        match typed.iter().position(|&key| key == LEAVE) {
            Some(end) => return to.write_all(typed.get(..end).unwrap_or_default()),
            None => to.write_all(typed)?,
        }
    }
}

/// The terminal in raw mode, until dropped. Nothing if stdin is no terminal.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> nix::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}
