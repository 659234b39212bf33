//! One QEMU: its arguments, its process, its QMP connection.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use anyhow::{Context, Result, bail};

use super::{disk::NODE, qmp::Qmp};
use crate::{
    inside::net::{GUEST_MAC, TAP},
    paper::plan::Application,
    scenario::Side,
};

/// Where the lab puts QEMU.
pub(super) const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// How much of what QEMU said explains its end.
const LAST_WORDS: usize = 4;

/// A QEMU that runs; ends when dropped.
pub(super) struct Qemu {
    child: Child,
    log: PathBuf,
    /// By which it is driven.
    pub(super) qmp: Qmp,
    /// How it was started, as it could be typed.
    pub(super) command: String,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Boots the guest.
    Source,
    /// Waits for it.
    Target,
}

/// What both QEMUs of a run are started with.
pub(super) struct Setup<'a> {
    /// The guest.
    pub(super) application: &'a Application,
    /// Its kernel, initramfs and command line.
    pub(super) image: &'a Path,
    /// The base, read by both.
    pub(super) base: &'a Path,
    /// Sockets, overlays, logs.
    pub(super) work: &'a Path,
}

impl Setup<'_> {
    /// Starts the QEMU of one side.
    pub(super) fn start(&self, side: Side, role: Role, overlay: &Path) -> Result<Qemu> {
        let letter = side.letter();
        let socket = self.work.join(format!("{letter}-qmp"));
        let log = self.work.join(format!("{letter}-qemu.log"));
        let out = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let args = self.args(side, role, overlay, &socket)?;
        let mut command = side.namespace().command(Path::new(QEMU))?;
        command.args(&args).stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let mut child = command.spawn().with_context(|| format!("cannot run {QEMU}"))?;
        let words = std::iter::once(QEMU).chain(args.iter().map(String::as_str));
        let command = words.map(quoted).collect::<Vec<_>>().join(" ");
        match Qmp::connect(&socket) {
            Ok(qmp) => Ok(Qemu { child, log, qmp, command }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("cloudlet {letter}: {error}: {}", last_words(&log));
            }
        }
    }

    fn args(&self, side: Side, role: Role, overlay: &Path, socket: &Path) -> Result<Vec<String>> {
        let Application { memory_mib, vcpus, .. } = self.application;
        let part = |name: &str| self.image.join(name).display().to_string();
        let cmdline = fs::read_to_string(self.image.join("cmdline"))
            .with_context(|| format!("{} has no cmdline", self.image.display()))?;
        let console = self.work.join(format!("{}-console.log", side.letter()));
        let (base, overlay) = (self.base.display(), overlay.display());
        let mut args: Vec<String> = Vec::new();
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        add("-machine", "q35,accel=kvm".into());
        add("-cpu", "host".into());
        add("-smp", vcpus.to_string());
        add("-m", format!("{memory_mib}M"));
        add("-kernel", part("kernel"));
        add("-initrd", part("initramfs"));
        add("-append", cmdline.trim().to_owned());
        // Both sides hold the base: what is the guest's own is in the overlay.
        add("-blockdev", format!("driver=file,node-name=base-file,filename={base},read-only=on"));
        add("-blockdev", "driver=raw,node-name=base,file=base-file,read-only=on".into());
        add(
            "-blockdev",
            format!("driver=file,node-name=own-file,filename={overlay},discard=unmap"),
        );
        add(
            "-blockdev",
            format!("driver=qcow2,node-name={NODE},file=own-file,backing=base,discard=unmap"),
        );
        add("-device", format!("virtio-blk-pci,drive={NODE}"));
        add("-netdev", format!("tap,id=net,ifname={TAP},script=no,downscript=no"));
        add("-device", format!("virtio-net-pci,netdev=net,mac={GUEST_MAC},romfile="));
        add("-device", "virtio-rng-pci".into());
        add("-chardev", format!("file,id=console,path={}", console.display()));
        add("-serial", "chardev:console".into());
        add("-qmp", format!("unix:{},server=on,wait=off", socket.display()));
        if role == Role::Target {
            add("-incoming", "defer".into());
        }
        add("-display", "none".into());
        args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        Ok(args)
    }
}

impl Qemu {
    /// Why it ended, if it has.
    pub(super) fn end(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(format!("QEMU ended with {status}: {}", last_words(&self.log)))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Either may fail only because it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn last_words(log: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.get(lines.len().saturating_sub(LAST_WORDS)..) {
        None | Some([]) => "it said nothing".to_owned(),
        Some(last) => last.join(" | "),
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./,:=%+@".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_are_the_same_machine() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cmdline"), "console=ttyS0 quiet\n").unwrap();
        let application = Application {
            name: "idle".into(),
            image: "minimal".into(),
            memory_mib: 512,
            vcpus: 2,
            probe_ms: 50,
            before: Vec::new(),
        };
        let path = dir.path();
        let setup = Setup { application: &application, image: path, base: path, work: path };
        let args = |side, role| {
            setup.args(side, role, &path.join("own.qcow2"), &path.join("qmp")).unwrap().join(" ")
        };
        let source = args(Side::A, Role::Source);
        let target = args(Side::B, Role::Target);
        let expected = source
            .replace("a-console", "b-console")
            .replace("server=on,wait=off", "server=on,wait=off -incoming defer");
        assert_eq!(target, expected);
        assert!(
            source.contains("-smp 2 -m 512M") && source.contains("console=ttyS0 quiet -blockdev")
        );
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("driver=raw,node-name=x"), "driver=raw,node-name=x");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
