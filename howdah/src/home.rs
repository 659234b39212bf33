//! The directory in which a cloudlet keeps its bases and its VMs.
//!
//! ```text
//! HOME/identity          this cloudlet's key pair; HOME/peers.json the keys of others (crate::peers)
//! HOME/store/            bases (guest_images::store)
//! HOME/vms/NAME/
//!     lock               held by the process that runs the VM, with its pid
//!     config.json        how the machine is built, here
//!     ownership          the durable record of who may run the guest (handoff::ownership)
//!     disk.data, disk.map  the disk overlay
//!     visit, known/        what stays of a VM that was handed off (crate::visit)
//!     control.sock       the running process listens here
//!     console.log vm.log report.json
//! ```
//!
//! A VM directory without an ownership record belongs to nobody: it is left over from a creation
//! or a reception that did not finish, and may be removed or reused.

use std::{
    fmt, fs, io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use guest_images::{BaseId, overlay};
use handoff::ownership::{Journal, Record};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    cli::{Cpu, Limits},
    failure::{Exit, Failure},
    lock::{Lock, Probe},
    net::Attachment,
    visit,
};

/// The file that a VM's process has locked.
const LOCK: &str = "lock";
/// The longest VM name.
const MAX_NAME_BYTES: usize = 48;
/// No JSON file of a VM directory is larger.
const MAX_JSON_BYTES: u64 = 4 << 20;

/// A VM's name: safe as a file name, on a terminal and in a command line. Peers send names too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct VmName(String);

impl FromStr for VmName {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let fits = (1..=MAX_NAME_BYTES).contains(&s.len());
        let plain = s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if fits && plain && s.as_bytes()[0].is_ascii_alphanumeric() {
            Ok(Self(s.to_owned()))
        } else {
            Err(format!(
                "a name has 1 to {MAX_NAME_BYTES} of a-z A-Z 0-9 - _ . and starts with a letter or digit"
            ))
        }
    }
}

impl TryFrom<String> for VmName {
    type Error = String;

    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for VmName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// How a VM's machine is built on this host. Written when the VM is created or received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmConfig {
    /// Version of this file.
    pub(crate) version: u32,
    /// The base, by its id in hex.
    pub(crate) base: String,
    /// Guest memory.
    pub(crate) memory_mib: u64,
    /// Virtual CPUs.
    pub(crate) vcpus: u8,
    /// The host's TAP device for the guest's network, if it has one.
    pub(crate) tap: Option<String>,
    /// The guest's MAC address, if it has a network device.
    pub(crate) mac: Option<String>,
    /// Appended to the base's kernel command line.
    pub(crate) append: String,
    /// Which CPU the guest is shown when it boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpu: Option<Cpu>,
    /// The network that it is in, if the cloudlet manages that: then `tap` is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) network: Option<Attachment>,
    /// What it may take of its host.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub(crate) limits: Limits,
    /// Whether the next start goes on from the base's memory. Only the first one does: afterwards
    /// the disk is no longer the one that the memory belongs to. Since version 2.
    #[serde(default)]
    pub(crate) from_memory: bool,
    /// Whether memory is kept that the guest reports free.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) keep_free_pages: bool,
}

impl VmConfig {
    /// The version this program writes.
    pub(crate) const VERSION: u32 = 2;
    /// The oldest version this program reads.
    const OLDEST: u32 = 1;

    /// A machine with nothing to its name, that boots.
    pub(crate) fn of(base: &BaseId) -> Self {
        Self {
            version: Self::VERSION,
            base: base.to_string(),
            memory_mib: 0,
            vcpus: 1,
            tap: None,
            mac: None,
            append: String::new(),
            cpu: None,
            network: None,
            limits: Limits::default(),
            from_memory: false,
            keep_free_pages: false,
        }
    }
}

/// A cloudlet's directory.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    root: PathBuf,
}

impl Home {
    /// Names the directory; nothing is created before something is to be kept.
    pub(crate) fn new(root: &Path) -> Result<Self, Failure> {
        // Absolute, because processes started from here outlive this one's working directory.
        let root = std::path::absolute(root).map_err(|e| Failure::file("home", root, &e))?;
        Ok(Self { root })
    }

    /// The directory itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where bases are.
    pub(crate) fn store(&self) -> PathBuf {
        self.root.join("store")
    }

    /// Creates the directory if it is not there.
    pub(crate) fn create(&self) -> Result<(), Failure> {
        fs::create_dir_all(&self.root).map_err(|e| Failure::file("create", &self.root, &e))
    }

    /// Where this cloudlet's key pair is.
    pub(crate) fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }

    /// Where the peers are that it knows.
    pub(crate) fn peers(&self) -> PathBuf {
        self.root.join("peers.json")
    }

    /// Where the networks are that it manages.
    pub(crate) fn networks(&self) -> PathBuf {
        self.root.join("networks.json")
    }

    /// Held by who brings the host's network to what VMs are.
    pub(crate) fn networks_lock(&self) -> PathBuf {
        self.root.join("networks.lock")
    }

    /// Where it is noted where guests came from and went to.
    pub(crate) fn trails(&self) -> PathBuf {
        self.root.join("trails.json")
    }

    /// What tells this cloudlet from others on its host: eight hexadecimal digits.
    pub(crate) fn tag(&self) -> String {
        blake3::hash(self.root.as_os_str().as_encoded_bytes()).to_hex()[..8].to_owned()
    }

    /// Where receiving processes log; creates its directory.
    pub(crate) fn receive_log(&self) -> Result<PathBuf, Failure> {
        self.create()?;
        Ok(self.root.join("receive.log"))
    }

    /// One VM's directory, which may not exist.
    pub(crate) fn vm(&self, name: &VmName) -> VmDir {
        VmDir { path: self.root.join("vms").join(name.as_ref()), name: name.clone() }
    }

    /// One VM's directory, which must exist.
    pub(crate) fn existing(&self, name: &VmName) -> Result<VmDir, Failure> {
        let dir = self.vm(name);
        if dir.path.is_dir() {
            return Ok(dir);
        }
        let why = format!("there is none in {}", self.root.display());
        Err(Failure::new(
            Exit::NotFound,
            format!("VM {name}"),
            why,
            "`howdah vm ls` lists the VMs, --home chooses another directory",
        ))
    }

    /// Every VM's directory, by name.
    pub(crate) fn vms(&self) -> Result<Vec<VmDir>, Failure> {
        let path = self.root.join("vms");
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Failure::file("list", &path, &e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| Failure::file("list", &path, &e))?;
            // Anything else (a directory being removed) has a name no VM can have.
            if let Some(name) = entry.file_name().to_str().and_then(|n| n.parse::<VmName>().ok()) {
                found.push(self.vm(&name));
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

/// How often a directory that somebody else removes is tried for.
const FEW_TRIES: u32 = 10;
const BETWEEN_TRIES: std::time::Duration = std::time::Duration::from_millis(20);

/// One VM's directory.
#[derive(Clone, Debug)]
pub(crate) struct VmDir {
    path: PathBuf,
    name: VmName,
}

impl VmDir {
    /// The VM's name.
    pub(crate) fn name(&self) -> &VmName {
        &self.name
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the running process listens.
    pub(crate) const SOCKET: &str = "control.sock";

    /// Where the guest's serial output is kept.
    pub(crate) fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// Where the VM's process logs.
    pub(crate) fn vm_log(&self) -> PathBuf {
        self.path.join("vm.log")
    }

    /// Where the last handoff's report is.
    pub(crate) fn report(&self) -> PathBuf {
        self.path.join("report.json")
    }

    /// Creates the directory if it is not there. Only its owner may look into it: the control
    /// socket lets one do anything with the guest.
    pub(crate) fn create(&self) -> Result<(), Failure> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(|e| Failure::file("create", &self.path, &e))
    }

    /// Takes the VM for this process, or says who has it.
    pub(crate) fn lock(&self) -> Result<Lock, Failure> {
        let path = self.path.join(LOCK);
        match Lock::take(&path) {
            Ok(Some(lock)) => Ok(lock),
            Ok(None) => Err(self.in_use()),
            Err(e) => Err(Failure::file("lock", &path, &e)),
        }
    }

    /// Creates the directory and takes it for this process. What came before it to nothing may be about to
    /// be removed, lock and all: that is waited for, for a moment.
    pub(crate) fn create_and_lock(&self) -> Result<Lock, Failure> {
        let path = self.path.join(LOCK);
        let mut tries = 0..FEW_TRIES;
        loop {
            self.create()?;
            match Lock::take(&path) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) if tries.next().is_none() => return Err(self.in_use()),
                Err(e) if e.kind() != io::ErrorKind::NotFound || tries.next().is_none() => {
                    return Err(Failure::file("lock", &path, &e));
                }
                Ok(None) | Err(_) => std::thread::sleep(BETWEEN_TRIES),
            }
        }
    }

    /// Whether a process has the VM, without disturbing it.
    pub(crate) fn probe(&self) -> Result<Probe, Failure> {
        let path = self.path.join(LOCK);
        Lock::probe(&path).map_err(|e| Failure::file("look at", &path, &e))
    }

    fn in_use(&self) -> Failure {
        let who = match self.probe() {
            Ok(Probe::Held { pid: Some(pid) }) => format!("process {pid} has it"),
            _ => "another process has it".to_owned(),
        };
        let name = &self.name;
        Failure::new(
            Exit::Conflict,
            format!("VM {name}"),
            who,
            format!("`howdah vm inspect {name}` shows it, `howdah vm stop {name}` ends it"),
        )
    }

    /// The ownership journal. Writing needs the lock.
    pub(crate) fn journal(&self) -> Result<Journal, Failure> {
        Journal::open(self.path.join("ownership"))
            .map_err(|e| Failure::plain(Exit::Corrupt, format!("VM {}", self.name), e))
    }

    /// The ownership record, `None` for a directory that belongs to nobody.
    pub(crate) fn record(&self) -> Result<Option<Record>, Failure> {
        Ok(self.journal()?.record().cloned())
    }

    /// The machine's configuration.
    pub(crate) fn config(&self) -> Result<VmConfig, Failure> {
        let config: VmConfig = read_json(&self.config_path())?;
        if (VmConfig::OLDEST..=VmConfig::VERSION).contains(&config.version) {
            return Ok(VmConfig { version: VmConfig::VERSION, ..config });
        }
        Err(Failure::new(
            Exit::Corrupt,
            self.config_path().display(),
            format!("version {}, this program reads up to {}", config.version, VmConfig::VERSION),
            "use the howdah that wrote it",
        ))
    }

    /// Writes the machine's configuration.
    pub(crate) fn write_config(&self, config: &VmConfig) -> Result<(), Failure> {
        write_json(&self.config_path(), config)
    }

    fn config_path(&self) -> PathBuf {
        self.path.join("config.json")
    }

    /// Removes the disk overlay, and the visit that goes with it: only when the guest never ran on
    /// it, or never will again.
    pub(crate) fn remove_disk(&self) -> Result<(), Failure> {
        visit::forget(self)?;
        for file in [overlay::DATA_FILE, overlay::MAP_FILE] {
            let path = self.path.join(file);
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Failure::file("remove", &path, &e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Empties the directory, for a process that is confined to it: whoever started that process
    /// removes the rest with [`VmDir::remove_if_empty`]. The lock must be held; its file goes last.
    pub(crate) fn clear(&self, lock: Lock) -> Result<(), Failure> {
        let failed = |e: io::Error| Failure::file("empty", &self.path, &e);
        for entry in fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let is_dir = entry.file_type().map_err(failed)?.is_dir();
            match entry.file_name().to_str() {
                Some(LOCK) => Ok(()),
                _ if is_dir => fs::remove_dir_all(entry.path()),
                _ => fs::remove_file(entry.path()),
            }
            .map_err(failed)?;
        }
        let removed = fs::remove_file(self.path.join(LOCK)).map_err(failed);
        drop(lock);
        removed
    }

    /// Removes the directory if nothing is in it: then nobody has it.
    pub(crate) fn remove_if_empty(&self) {
        // Most are not empty, and somebody else may have been faster.
        let _ = fs::remove_dir(&self.path);
    }

    /// Removes the directory and all in it. The lock must be held, so that nobody runs the VM;
    /// the name is free at once, whatever becomes of the rest.
    pub(crate) fn remove(&self, lock: Lock) -> Result<(), Failure> {
        let failed = |e: &io::Error| Failure::file("remove", &self.path, e);
        let gone = self.path.with_file_name(format!(".{}.{}", self.name, std::process::id()));
        fs::rename(&self.path, &gone).map_err(|e| failed(&e))?;
        let removed = fs::remove_dir_all(&gone).map_err(|e| failed(&e));
        drop(lock);
        removed
    }
}

/// Reads a bounded JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    use io::Read;
    let failed = |e: io::Error| Failure::file("read", path, &e);
    let mut text = String::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MAX_JSON_BYTES).read_to_string(&mut text).map_err(failed)?;
    serde_json::from_str(&text).map_err(|e| {
        Failure::new(
            Exit::Corrupt,
            path.display(),
            e,
            "restore it, or remove the VM and create it again",
        )
    })
}

/// Replaces a JSON file as a whole, durably.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Failure> {
    use io::Write;
    let failed = |e: io::Error| Failure::file("write", path, &e);
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| failed(e.into()))?;
    text.push(b'\n');
    let temporary = path.with_extension("json.new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed)?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&temporary, path).and_then(|()| sync_parent(path)).map_err(failed)
}

/// Makes durable that a file has, or no longer has, its name.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::File::open(directory).and_then(|d| d.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe() {
        for good in ["a", "vm-1", "A.b_c", &"x".repeat(MAX_NAME_BYTES)] {
            good.parse::<VmName>().unwrap();
        }
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        for bad in ["", ".", "..", ".hidden", "-flag", "a/b", "a b", "ü", "a\n", &long] {
            bad.parse::<VmName>().unwrap_err();
        }
    }

    #[test]
    fn a_config_survives_and_damage_is_named() {
        let home = tempfile::tempdir().unwrap();
        let dir = Home::new(home.path()).unwrap().vm(&"a".parse().unwrap());
        dir.create().unwrap();
        let config = VmConfig {
            memory_mib: 512,
            mac: Some("02:00:00:00:00:01".into()),
            from_memory: true,
            ..VmConfig::of(&BaseId([0; 32]))
        };
        dir.write_config(&config).unwrap();
        assert_eq!(dir.config().unwrap(), config);
        // Of version 1, which knew no memory of a base.
        let text = fs::read_to_string(dir.config_path()).unwrap();
        let old = text.replace("\"version\": 2", "\"version\": 1");
        let old = old.replace(",\n  \"from_memory\": true", "");
        assert!(!old.contains("from_memory") && old != text);
        fs::write(dir.config_path(), old).unwrap();
        assert_eq!(dir.config().unwrap(), VmConfig { from_memory: false, ..config });
        fs::write(dir.config_path(), "{").unwrap();
        let failure = dir.config().unwrap_err();
        assert_eq!(failure.exit, Exit::Corrupt);
        assert!(failure.message.contains("config.json"), "{failure}");
    }

    #[test]
    fn only_vms_are_listed() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::new(root.path()).unwrap();
        assert!(home.vms().unwrap().is_empty());
        for name in ["b", "a"] {
            home.vm(&name.parse().unwrap()).create().unwrap();
        }
        fs::create_dir(root.path().join("vms/.c.1")).unwrap();
        let names: Vec<_> = home.vms().unwrap().iter().map(|d| d.name().to_string()).collect();
        assert_eq!(names, ["a", "b"]);
        let dir = home.vm(&"a".parse().unwrap());
        let lock = dir.lock().unwrap();
        assert_eq!(dir.lock().unwrap_err().exit, Exit::Conflict);
        dir.remove(lock).unwrap();
        assert_eq!(home.existing(dir.name()).unwrap_err().exit, Exit::NotFound);
    }
}
