//! Runs the binary as a user does, in a home of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// A cloudlet's home and a directory for files.
pub(crate) struct Cloudlet {
    root: TempDir,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Cloudlet {
    pub(crate) fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.path("home")
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_howdah"));
        command.env("HOWDAH_HOME", self.home()).env_remove("HOWDAH_LOG");
        command.env_remove("HOWDAH_RECIPES").current_dir(self.root.path());
        command
    }

    /// Runs `howdah` with these words.
    pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Ran {
        Ran::from(self.command().args(words).output().unwrap())
    }

    /// Runs `howdah` with the words of a line.
    pub(crate) fn line(&self, line: &str) -> Ran {
        self.run(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// Writes a file.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// Imports a base that looks real enough to be imported.
    pub(crate) fn base(&self, name: &str) -> Ran {
        self.file("disk.raw", &disk());
        self.file("kernel", &kernel());
        self.run(&["base", "import", name, "--disk", "disk.raw", "--kernel", "kernel"])
    }

    /// A machine that no host has to be able to run.
    pub(crate) fn profile(mac: Option<[u8; 6]>) -> vmm::MachineProfile {
        vmm::MachineProfile {
            vcpus: 2,
            memory_bytes: 32 << 20,
            disk: true,
            mac,
            cpuid: vec![Default::default()],
            tsc_khz: 2_000_000,
            xsave_bytes: 4096,
        }
    }

    /// Imports a base with 32 MiB of memory, whose machine has this MAC address.
    pub(crate) fn base_with_memory(&self, name: &str, mac: Option<[u8; 6]>) -> Ran {
        self.file("disk.raw", &disk());
        self.file("kernel", &kernel());
        let mut ram = vec![0; 32 << 20];
        ram[4096..8192].fill(7);
        self.file("memory.raw", &ram);
        let profile = Self::profile(mac);
        let machine = vmm::MachineSnapshot { profile, state: vec![1; 100] }.encode().unwrap();
        self.file("machine", &machine);
        let words = "--disk disk.raw --kernel kernel --memory memory.raw --machine machine";
        self.line(&format!("base import {name} {words}"))
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// It failed as every command must: this code, one line on stderr that holds these texts.
    pub(crate) fn fails(self, code: i32, holds: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "not one line: {self:?}");
        assert!(self.stderr.starts_with("howdah: "), "{self:?}");
        for text in holds {
            assert!(self.stderr.contains(text), "no {text:?} in {self:?}");
        }
        self
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// The key that the cloudlet shows.
pub(crate) fn key_of(cloudlet: &Cloudlet) -> String {
    let shown = cloudlet.line("identity --json").ok().json();
    shown["key"].as_str().unwrap().to_owned()
}

/// Three chunks, the middle one zero.
pub(crate) fn disk() -> Vec<u8> {
    let mut disk = vec![1; 3 * 4096];
    disk[4096..8192].fill(0);
    disk
}

/// The least that passes for a bzImage.
pub(crate) fn kernel() -> Vec<u8> {
    let mut kernel = vec![0; 16384];
    kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    kernel[0x1f1] = 4;
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    kernel[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    kernel
}

/// Makes a file executable.
pub(crate) fn executable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
