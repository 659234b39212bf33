//! What the lab host is made of: the accelerator this machine allows, and a kernel with modules.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::root::Root;

/// Names another directory that holds `vmlinuz` and `modules/VERSION`.
pub(crate) const KERNEL_ENV: &str = "HOWDAH_LAB_KERNEL";

/// How QEMU runs the lab host's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// By this machine's own virtualisation.
    Hardware,
    /// By software, which emulates AMD SVM with nested paging.
    Software,
}

impl Accelerator {
    /// Decides by the CPU's flags. That `/dev/kvm` opens says little: where the CPU has neither
    /// flag it may be there and interpret its guests, a thousand times slower.
    pub(crate) fn detect() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let opens = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        match (has_virtualisation(&cpuinfo), opens) {
            (true, true) => Self::Hardware,
            (true, false) => {
                eprintln!(
                    "lab: this CPU has hardware virtualisation but /dev/kvm does not open: \
                     load kvm_intel or kvm_amd, and join the group kvm, for a faster lab"
                );
                Self::Software
            }
            (false, _) => Self::Software,
        }
    }

    /// QEMU's arguments.
    pub(crate) fn qemu_args(self) -> &'static [&'static str] {
        match self {
            Self::Hardware => &["-accel", "kvm", "-cpu", "host"],
            // Without PKU: with it, the nested guest's kernel finds its XSAVE sizes inconsistent.
            Self::Software => &["-accel", "tcg,thread=multi", "-cpu", "max,-pku"],
        }
    }

    /// The choice in words, for the user.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Hardware => "hardware virtualisation (svm or vmx in /proc/cpuinfo)",
            Self::Software => {
                "software emulation of AMD SVM (no svm or vmx in /proc/cpuinfo that can be used): \
                 about 5 times slower than hardware"
            }
        }
    }
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx"))
}

/// The lab host's kernel.
#[derive(Debug)]
pub(crate) struct HostKernel {
    /// The bzImage.
    pub(crate) image: PathBuf,
    /// The kernel's release, as `uname -r` says it.
    pub(crate) release: String,
    /// The tree of its modules.
    pub(crate) modules: PathBuf,
}

impl HostKernel {
    /// Where `make` puts it, or where [`KERNEL_ENV`] points.
    pub(crate) fn find(root: &Root) -> Result<Self> {
        let dir =
            env::var_os(KERNEL_ENV).map_or_else(|| root.path("target/kernel/host"), PathBuf::from);
        Self::open(&dir)
    }

    fn open(dir: &Path) -> Result<Self> {
        let image = dir.join("vmlinuz");
        if !image.is_file() {
            bail!(
                "the lab host's kernel {} is missing: run kernel/fetch, or point {KERNEL_ENV} at \
                 a directory that holds vmlinuz and modules/VERSION",
                image.display()
            );
        }
        let trees = dir.join("modules");
        let entries =
            fs::read_dir(&trees).with_context(|| format!("cannot read {}", trees.display()))?;
        let mut releases = Vec::new();
        for entry in entries {
            releases.push(entry?.file_name().to_string_lossy().into_owned());
        }
        match releases.as_slice() {
            [release] => Ok(Self { image, release: release.clone(), modules: trees.join(release) }),
            _ => bail!(
                "{} must hold the modules of exactly one kernel and holds {}: run kernel/fetch",
                trees.display(),
                releases.len()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_flags_decide() {
        assert!(has_virtualisation("processor\t: 0\nflags\t\t: fpu vme svm sse\n"));
        assert!(has_virtualisation("flags\t\t: fpu vmx\n"));
        assert!(!has_virtualisation("flags\t\t: fpu svm_lock\nvmx flags\t: vmx\nbugs\t: svm\n"));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn a_missing_kernel_says_what_to_run() {
        let dir = tempfile::tempdir().unwrap();
        let error = HostKernel::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("kernel/fetch"), "{error}");
    }
}
