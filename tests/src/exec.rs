//! `lab exec`: one command in a lab host.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::machine::{
    host::{Accelerator, HostKernel},
    image::{self, Extra},
    job::{Job, Share},
    qemu::Machine,
    root::{Root, lock},
};

/// CPUs of a lab host unless said otherwise: one for the guest, one for what moves it.
pub(crate) const DEFAULT_CPUS: u8 = 2;

/// Least memory in which a lab host boots.
const MIN_MEMORY_MIB: u32 = 256;

/// Arguments of `lab exec`.
#[derive(Args)]
pub(crate) struct ExecArgs {
    /// Copy this directory or file to /add/NAME in the lab host; may be given several times
    #[arg(long, value_name = "PATH")]
    add: Vec<PathBuf>,

    /// Show this directory, read-only and not copied, at /share/NAME; may be given several times
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,

    /// Set a variable in the command's environment; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,

    /// Take what the command leaves in /out to this directory [default: target/lab/out]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Memory of the lab host
    #[arg(long, value_name = "N", default_value_t = 5120,
          value_parser = clap::value_parser!(u32).range(i64::from(MIN_MEMORY_MIB)..))]
    memory_mib: u32,

    /// CPUs of the lab host
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CPUS,
          value_parser = clap::value_parser!(u8).range(1..=64))]
    cpus: u8,

    /// End the lab host after this time, whatever it does
    #[arg(long, value_name = "N", default_value_t = 600)]
    timeout_s: u64,

    /// The command, looked up in the lab host
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command and returns its exit status.
pub(crate) fn exec(args: &ExecArgs) -> Result<i32> {
    let root = Root::find()?;
    let mut request = Request {
        command: args.command.clone(),
        env: args.env.clone(),
        extras: Vec::new(),
        shares: Vec::new(),
        out: match &args.out {
            Some(dir) => dir.clone(),
            None => root.lab_dir()?.join("out"),
        },
        memory_mib: args.memory_mib,
        cpus: args.cpus,
        timeout: Duration::from_secs(args.timeout_s),
    };
    for path in &args.add {
        request.add(path, "/add")?;
    }
    for path in &args.share {
        if !path.is_dir() {
            bail!("--share {}: not a directory", path.display());
        }
        request.share(path, &below("/share", path)?, false)?;
    }
    request.run(&root, io::stdout(), io::stderr())
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// One boot of a lab host, and all that it is given.
pub(crate) struct Request {
    /// The command and its arguments.
    pub(crate) command: Vec<String>,
    /// Its environment.
    pub(crate) env: Vec<(String, String)>,
    /// Files in the initramfs, and directories whose libraries are needed.
    pub(crate) extras: Vec<Extra>,
    /// Directories over 9p, and how they are mounted.
    pub(crate) shares: Vec<(PathBuf, Share)>,
    /// Takes `/out`.
    pub(crate) out: PathBuf,
    /// Memory of the lab host.
    pub(crate) memory_mib: u32,
    /// Its CPUs.
    pub(crate) cpus: u8,
    /// The time after which it is ended.
    pub(crate) timeout: Duration,
}

impl Request {
    /// Copies a directory or a file to `DIR/NAME` in the lab host.
    pub(crate) fn add(&mut self, path: &Path, dir: &str) -> Result<()> {
        let to = below(dir, path)?;
        if path.is_dir() {
            self.share(path, &to, true)
        } else if path.is_file() {
            self.extras.push(Extra::File { from: path.to_owned(), to: to.into() });
            Ok(())
        } else {
            bail!("{}: no such file or directory", path.display())
        }
    }

    /// Gives a directory at the path `at`, with the libraries of its executables.
    pub(crate) fn share(&mut self, dir: &Path, at: &str, copy: bool) -> Result<()> {
        let dir =
            fs::canonicalize(dir).with_context(|| format!("cannot read {}", dir.display()))?;
        let tag = format!("share{}", self.shares.len());
        self.extras.push(Extra::Dir(dir.clone()));
        self.shares.push((dir, Share { tag, at: at.to_owned(), copy }));
        Ok(())
    }

    /// Boots the lab host, runs the command, and returns its exit status.
    pub(crate) fn run(
        self,
        root: &Root,
        stdout: impl io::Write + Send + 'static,
        stderr: impl io::Write + Send + 'static,
    ) -> Result<i32> {
        let lab_dir = root.lab_dir()?;
        let kernel = HostKernel::find(root)?;
        let accelerator = Accelerator::detect();
        let _lock = lock(&lab_dir)?;
        eprintln!("lab: the host runs by {}", accelerator.describe());
        fs::create_dir_all(&self.out)
            .with_context(|| format!("cannot make {}", self.out.display()))?;
        let job = Job {
            modules: Vec::new(),
            optional_modules: Vec::new(),
            shares: self.shares.iter().map(|(_, share)| share.clone()).collect(),
            command: self.command,
            env: self.env,
        };
        let initramfs = lab_dir.join("initramfs.cpio");
        image::build(&initramfs, &kernel, &self.extras, job)?;
        let shares: Vec<(String, PathBuf)> =
            self.shares.into_iter().map(|(dir, share)| (share.tag, dir)).collect();
        let machine = Machine {
            accelerator,
            kernel: &kernel,
            initramfs: &initramfs,
            memory_mib: self.memory_mib,
            cpus: self.cpus,
            timeout: self.timeout,
            shares: &shares,
            out: &self.out,
            console: &lab_dir.join("console.log"),
        };
        machine.run(stdout, stderr)
    }
}

/// Where `path` is found below `dir` in the lab host: under its own name.
fn below(dir: &str, path: &Path) -> Result<String> {
    let full = fs::canonicalize(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = full
        .file_name()
        .and_then(|name| name.to_str())
        .with_context(|| format!("{} has no name to add it under", path.display()))?;
    Ok(format!("{dir}/{name}"))
}
