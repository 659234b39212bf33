//! The lab host's initramfs: everything it is made of, in memory.

use std::{
    env, fs,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{
    cpio::CpioWriter,
    host::HostKernel,
    job::{JOB_PATH, Job},
    libraries::{add_executable, add_libraries, executables_below, find_tool, is_elf_executable},
    modules::ModuleTree,
};

/// Modules every lab host loads.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "kvm",
    "tun",
    "veth",
    "bridge",
    "ifb",
    "sch_netem",
    "sch_tbf",
    "sch_htb",
    "loop",
];

/// Modules of which one fits the CPU.
const CPU_MODULES: &[&str] = &["kvm_amd", "kvm_intel"];

/// Modules that come along for `modprobe`, where the kernel has them.
const MODULES_AT_HAND: &[&str] = &[
    "ext4",
    "virtio_blk",
    "dm_mod",
    "dm_flakey",
    "dm_delay",
    "nbd",
    "wireguard",
    "tcp_bbr",
    "sch_fq",
    "sch_fq_codel",
    "overlay",
    "vhost_net",
];

/// Tools without which there is no lab, and the packages they are in.
const TOOLS: &[(&str, &str)] =
    &[("ip", "iproute2"), ("tc", "iproute2"), ("e2fsck", "e2fsprogs"), ("debugfs", "e2fsprogs")];

/// Tools that come along where they are installed.
const TOOLS_AT_HAND: &[&str] =
    &["mke2fs", "dumpe2fs", "dmsetup", "ethtool", "strace", "zstd", "tcpdump"];

/// Something the user adds to a lab host.
#[derive(Clone, Debug)]
pub(crate) enum Extra {
    /// A file, placed here.
    File {
        /// The file outside.
        from: PathBuf,
        /// Its path in the lab host.
        to: PathBuf,
    },
    /// A directory that comes over 9p; only the libraries of its executables are in the image.
    Dir(PathBuf),
}

/// Builds the initramfs at `path`; fills in the job's modules.
pub(crate) fn build(
    path: &Path,
    kernel: &HostKernel,
    extras: &[Extra],
    mut job: Job,
) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut cpio = CpioWriter::new(BufWriter::with_capacity(1 << 20, file));
    cpio.char_device(Path::new("/dev/console"), 5, 1)?;
    for dir in ["proc", "sys", "run", "tmp", "out", "add", "root", "etc", "var/tmp"] {
        cpio.dir(Path::new(dir))?;
    }
    cpio.file(Path::new("/etc/passwd"), 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    cpio.file(Path::new("/etc/group"), 0o644, b"root:x:0:\n")?;
    cpio.file(Path::new("/etc/hosts"), 0o644, b"127.0.0.1 localhost lab\n")?;
    add_tools(&mut cpio)?;
    add_modules(&mut cpio, kernel, &mut job)?;
    for extra in extras {
        add_extra(&mut cpio, extra)?;
    }
    cpio.file(Path::new(JOB_PATH), 0o644, &serde_json::to_vec_pretty(&job)?)?;
    cpio.finish().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

fn add_tools<W: Write>(cpio: &mut CpioWriter<W>) -> Result<()> {
    let lab = env::current_exe().context("cannot tell which file this program is")?;
    add_executable(cpio, &lab, Path::new("/lab/lab"))?;
    cpio.symlink(Path::new("/init"), "/lab/lab")?;
    let busybox = find_tool("busybox")
        .context("busybox is not installed: install the package busybox-static")?;
    add_executable(cpio, &busybox, Path::new("/bin/busybox"))?;
    // busybox's own shell runs its applets instead of the tools in PATH: ip and tc would be its own.
    match find_tool("dash") {
        Some(dash) => add_executable(cpio, &dash, Path::new("/bin/sh"))?,
        None => cpio.symlink(Path::new("/bin/sh"), "busybox")?,
    }
    for (tool, package) in TOOLS {
        let found = find_tool(tool)
            .with_context(|| format!("{tool} is not installed: install the package {package}"))?;
        add_executable(cpio, &found, &Path::new("/usr/sbin").join(tool))?;
    }
    for tool in TOOLS_AT_HAND {
        if let Some(found) = find_tool(tool) {
            add_executable(cpio, &found, &Path::new("/usr/sbin").join(tool))?;
        }
    }
    // netem reads its delay distributions from here.
    for dir in ["/usr/lib/tc", "/lib/tc"] {
        for file in fs::read_dir(dir).into_iter().flatten().flatten() {
            if file.path().extension().is_some_and(|suffix| suffix == "dist") {
                cpio.file(&file.path(), 0o644, &fs::read(file.path())?)?;
            }
        }
    }
    Ok(())
}

fn add_modules<W: Write>(
    cpio: &mut CpioWriter<W>,
    kernel: &HostKernel,
    job: &mut Job,
) -> Result<()> {
    let tree = ModuleTree::open(&kernel.modules)?;
    let wanted: Vec<&str> = [MODULES, CPU_MODULES]
        .concat()
        .into_iter()
        .chain(MODULES_AT_HAND.iter().copied().filter(|name| tree.has(name)))
        .collect();
    let loaded = tree.resolve(MODULES)?;
    let loaded: Vec<&str> = loaded.iter().map(|module| module.name.as_str()).collect();
    let all = tree.resolve(&wanted)?;
    let base = Path::new("/lib/modules").join(&kernel.release);
    let mut modules_dep = String::new();
    for module in &all {
        let path = base.join(&module.path);
        cpio.file(&path, 0o644, &module.data)?;
        let path_text = path.display().to_string();
        if loaded.contains(&module.name.as_str()) {
            job.modules.push(path_text);
        } else if is_for_cpu(&module.name) {
            job.optional_modules.push(path_text);
        }
        modules_dep.push_str(&format!("{}:", module.path.display()));
        for dependency in all.iter().filter(|other| module.depends.contains(&other.name)) {
            modules_dep.push_str(&format!(" {}", dependency.path.display()));
        }
        modules_dep.push('\n');
    }
    cpio.file(&base.join("modules.dep"), 0o644, modules_dep.as_bytes())?;
    Ok(())
}

/// `kvm_amd` needs `ccp`, which refuses CPUs of others as `kvm_amd` itself does.
fn is_for_cpu(module: &str) -> bool {
    CPU_MODULES.contains(&module) || module == "ccp"
}

fn add_extra<W: Write>(cpio: &mut CpioWriter<W>, extra: &Extra) -> Result<()> {
    match extra {
        Extra::File { from, to } => {
            use std::os::unix::fs::PermissionsExt;
            let meta =
                fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?;
            let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
            cpio.file(to, meta.permissions().mode(), &data)?;
            if is_elf_executable(from)? {
                add_libraries(cpio, from)?;
            }
        }
        Extra::Dir(dir) => {
            for executable in executables_below(dir)? {
                add_libraries(cpio, &executable)?;
            }
        }
    }
    Ok(())
}
