//! The peers that are known, in a file.

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use guest_images::BaseId;
use handoff::tls::PeerKey;
use serde::{Deserialize, Serialize};

use crate::{
    failure::{Exit, Failure},
    home::{Home, VmName, read_json, write_json},
    lock::Lock,
};

/// The version of the file.
const VERSION: u32 = 1;
/// A book of more peers is refused.
const MAX_PEERS: usize = 1000;
/// How long another process may take to change the file.
const CHANGE_PATIENCE: Duration = Duration::from_secs(5);

/// Something that a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    /// Hand VMs off to this cloudlet.
    Send,
    /// Be handed VMs of this cloudlet.
    Receive,
    /// Bring bases to this cloudlet.
    Push,
    /// Have bases of this cloudlet.
    Pull,
    /// Look at this cloudlet through its API.
    Observe,
    /// Do through its API what an operator can do.
    Operate,
}

/// What a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rights {
    /// Hand VMs off to this cloudlet.
    pub(crate) send: bool,
    /// Be handed VMs of this cloudlet.
    pub(crate) receive: bool,
    /// Bring bases to this cloudlet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) push: bool,
    /// Have bases of this cloudlet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) pull: bool,
    /// Look at this cloudlet through its API.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) observe: bool,
    /// Do through its API what an operator can do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) operate: bool,
}

impl Rights {
    /// None.
    const NONE: Self = Self {
        send: false,
        receive: false,
        push: false,
        pull: false,
        observe: false,
        operate: false,
    };
    /// Those of a peer of which nothing else is said: VMs come and go; what they are made of does not.
    pub(crate) const VMS: Self = Self { send: true, receive: true, ..Self::NONE };

    fn has(self, right: Right) -> bool {
        match right {
            Right::Send => self.send,
            Right::Receive => self.receive,
            Right::Push => self.push,
            Right::Pull => self.pull,
            // Who may do all may look.
            Right::Observe => self.observe || self.operate,
            Right::Operate => self.operate,
        }
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [
            (self.send, "send"),
            (self.receive, "receive"),
            (self.push, "push"),
            (self.pull, "pull"),
            (self.observe, "observe"),
            (self.operate, "operate"),
        ];
        let words: Vec<_> = words.iter().filter(|(has, _)| *has).map(|(_, word)| *word).collect();
        f.write_str(if words.is_empty() { "nothing".into() } else { words.join(",") }.as_str())
    }
}

impl FromStr for Rights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rights = Self::NONE;
        for word in text.split(',') {
            match word {
                "send" => rights.send = true,
                "receive" => rights.receive = true,
                "push" => rights.push = true,
                "pull" => rights.pull = true,
                "observe" => rights.observe = true,
                "operate" => rights.operate = true,
                other => {
                    let words = "send, receive, push, pull, observe, operate";
                    return Err(format!("{other:?} is none of {words}"));
                }
            }
        }
        Ok(rights)
    }
}

/// A cloudlet that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Peer {
    /// What users call it here.
    pub(crate) name: VmName,
    /// Who it is.
    pub(crate) key: PeerKey,
    /// Where its `howdah receive` listens: `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) address: Option<String>,
    /// Where its daemon's API listens for peers: `HOST:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) api: Option<String>,
    /// What it may do.
    pub(crate) rights: Rights,
    /// The bases that may go from or to it, and whose VMs may, by name or id; all, if it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bases: Option<Vec<String>>,
    /// Until when it may begin handoffs, in seconds since 1970; for ever, if it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) until: Option<u64>,
}

impl Peer {
    /// A peer that may hand VMs off and receive them.
    pub(crate) fn new(name: VmName, key: PeerKey) -> Self {
        let rights = Rights::VMS;
        Self { name, key, address: None, api: None, rights, bases: None, until: None }
    }

    /// Whether it may do that, now.
    pub(crate) fn check(&self, right: Right) -> Result<(), Failure> {
        let name = &self.name;
        let refused = |why: &str| {
            let way_out = format!("`howdah peer add {name} ...` again changes that");
            Err(Failure::new(Exit::Conflict, format!("peer {name}"), why, way_out))
        };
        match right {
            _ if self.is_over(now()) => refused("the time for which it was let in is over"),
            Right::Send if !self.rights.has(right) => refused("it may not hand VMs off to here"),
            Right::Receive if !self.rights.has(right) => {
                refused("it may not receive VMs from here")
            }
            Right::Push if !self.rights.has(right) => {
                refused("it may not push bases to here (--may push)")
            }
            Right::Pull if !self.rights.has(right) => {
                refused("it may not pull bases from here (--may pull)")
            }
            Right::Observe if !self.rights.has(right) => {
                refused("it may not use the API of here (--may observe, --may operate)")
            }
            Right::Operate if !self.rights.has(right) => {
                refused("it may look at this cloudlet and change nothing (--may operate)")
            }
            _ => Ok(()),
        }
    }

    /// Whether its time is over.
    pub(crate) fn is_over(&self, now: u64) -> bool {
        self.until.is_some_and(|until| now >= until)
    }

    /// Whether VMs of this base may go from or to it; `id_of` knows the names of bases here.
    pub(crate) fn allows_base(&self, id: BaseId, id_of: impl Fn(&str) -> Option<BaseId>) -> bool {
        let Some(bases) = &self.bases else { return true };
        bases.iter().any(|base| *base == id.to_string() || id_of(base) == Some(id))
    }
}

/// A text for people, in which the keys of endpoints are replaced by these names.
pub(crate) fn name_all<K: fmt::Display, N: fmt::Display>(
    peers: impl Iterator<Item = (K, N)>,
    text: &str,
) -> String {
    peers.fold(text.to_owned(), |text, (key, name)| {
        text.replace(&format!("{key}@"), &format!("{name} at "))
    })
}

/// Seconds since 1970, as this host's clock has it.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// All peers that are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Book {
    peers: Vec<Peer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u32,
    peers: Vec<Peer>,
}

impl Book {
    /// Of these peers.
    #[cfg(test)]
    pub(crate) fn of(peers: Vec<Peer>) -> Self {
        Self { peers }
    }

    /// The peers, by name.
    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// The peer of a key.
    pub(crate) fn by_key(&self, key: PeerKey) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.key == key)
    }

    /// The peer of a name.
    pub(crate) fn by_name(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name.as_ref() == name)
    }

    /// A text for people, in which the keys of endpoints that are known are replaced by names.
    pub(crate) fn name_all(&self, text: &str) -> String {
        name_all(self.peers.iter().map(|peer| (peer.key, &peer.name)), text)
    }

    /// Adds a peer, or changes what is said of one. Neither a name nor a key moves to another.
    pub(crate) fn put(&mut self, peer: Peer) -> Result<(), Failure> {
        let what = format!("peer {}", peer.name);
        let taken =
            self.peers.iter().find(|other| (other.name == peer.name) != (other.key == peer.key));
        if let Some(other) = taken {
            let way_out = format!("`howdah peer rm {}` first, if it is to be replaced", other.name);
            let why = format!("peer {} has {}", other.name, other.key);
            return Err(Failure::new(Exit::Conflict, what, why, way_out));
        }
        self.peers.retain(|other| other.key != peer.key);
        if self.peers.len() >= MAX_PEERS {
            let why = format!("{MAX_PEERS} are known already");
            return Err(Failure::new(Exit::Failed, what, why, "remove some (`howdah peer rm`)"));
        }
        self.peers.push(peer);
        self.peers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(())
    }

    /// Removes a peer, if there is one of that name.
    pub(crate) fn remove(&mut self, name: &VmName) -> Option<Peer> {
        let at = self.peers.iter().position(|peer| peer.name == *name)?;
        Some(self.peers.remove(at))
    }
}

/// The file with the book, read again when it has changed.
#[derive(Debug)]
pub(crate) struct BookFile {
    path: PathBuf,
    lock: PathBuf,
    read: Mutex<Option<(Stamp, Arc<Book>)>>,
}

/// By what it is seen that the file is another: it is only ever replaced.
type Stamp = (u64, i64, i64, u64);

impl BookFile {
    /// That of a cloudlet.
    pub(crate) fn of(home: &Home) -> Self {
        let path = home.peers();
        Self { lock: path.with_extension("lock"), path, read: Mutex::default() }
    }

    /// The book as it is now.
    pub(crate) fn read(&self) -> Result<Arc<Book>, Failure> {
        let stamp = match fs::metadata(&self.path) {
            Ok(meta) => (meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Arc::default()),
            Err(e) => return Err(Failure::file("read", &self.path, &e)),
        };
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, book)) = &*read
            && *of == stamp
        {
            return Ok(Arc::clone(book));
        }
        let book = Arc::new(self.load()?);
        *read = Some((stamp, Arc::clone(&book)));
        Ok(book)
    }

    fn load(&self) -> Result<Book, Failure> {
        let stored: Stored = read_json(&self.path)?;
        let damaged = |why: String, way_out: &str| {
            Err(Failure::new(Exit::Corrupt, self.path.display(), why, way_out))
        };
        if stored.version != VERSION {
            let why = format!("version {}, this program reads {VERSION}", stored.version);
            return damaged(why, "use the howdah that wrote it");
        }
        let mut book = Book::default();
        for peer in stored.peers {
            // By hand a key may have been written twice.
            if let Err(failure) = book.put(peer) {
                return damaged(failure.message, "correct it");
            }
        }
        Ok(book)
    }

    /// Changes the book durably. One process at a time.
    pub(crate) fn change<T>(
        &self,
        home: &Home,
        change: impl FnOnce(&mut Book) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        home.create()?;
        let _lock = self.take_lock()?;
        let mut book = (*self.read()?).clone();
        let changed = change(&mut book)?;
        write_json(&self.path, &Stored { version: VERSION, peers: book.peers })?;
        Ok(changed)
    }

    fn take_lock(&self) -> Result<Lock, Failure> {
        let begun = std::time::Instant::now();
        loop {
            match Lock::take(&self.lock) {
                Ok(Some(lock)) => return Ok(lock),
                Ok(None) if begun.elapsed() < CHANGE_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(None) => {
                    let why = "another process is changing it";
                    return Err(Failure::new(
                        Exit::Conflict,
                        self.path.display(),
                        why,
                        "try again",
                    ));
                }
                Err(e) => return Err(Failure::file("lock", &self.lock, &e)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use handoff::tls::Identity;

    use super::*;

    fn peer(name: &str) -> Peer {
        Peer::new(name.parse().unwrap(), Identity::generate().unwrap().key())
    }

    #[test]
    fn a_book_survives_and_changes_are_seen() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::new(&root.path().join("new")).unwrap();
        let (file, other) = (BookFile::of(&home), BookFile::of(&home));
        assert_eq!(*file.read().unwrap(), Book::default());
        let full = Peer {
            address: Some("b:7070".into()),
            api: Some("b:7071".into()),
            rights: "receive".parse().unwrap(),
            bases: Some(vec!["web".into()]),
            until: Some(5),
            ..peer("b")
        };
        for peer in [full.clone(), peer("a")] {
            file.change(&home, |book| book.put(peer)).unwrap();
        }
        let book = other.read().unwrap();
        assert_eq!(book.by_name("b"), Some(&full));
        assert_eq!(book.by_key(full.key), Some(&full));
        let removed = file.change(&home, |book| Ok(book.remove(&"b".parse().unwrap()))).unwrap();
        assert_eq!(removed, Some(full));
        assert_eq!(other.read().unwrap().peers().len(), 1);
        fs::write(home.peers(), "{\"version\": 9, \"peers\": []}").unwrap();
        assert_eq!(other.read().unwrap_err().exit, Exit::Corrupt);
    }

    #[test]
    fn names_and_keys_stay_with_each_other() {
        let mut book = Book::default();
        let (a, b) = (peer("a"), peer("b"));
        book.put(a.clone()).unwrap();
        book.put(b.clone()).unwrap();
        let stolen = Peer { key: b.key, ..a.clone() };
        assert_eq!(book.put(stolen).unwrap_err().exit, Exit::Conflict);
        assert_eq!(book.put(peer("a")).unwrap_err().exit, Exit::Conflict);
        let renamed = Peer { name: "c".parse().unwrap(), ..a.clone() };
        assert_eq!(book.put(renamed).unwrap_err().exit, Exit::Conflict);
        let moved = Peer { address: Some("x:1".into()), ..a };
        book.put(moved.clone()).unwrap();
        assert_eq!(book.peers(), [moved, b]);
    }

    #[test]
    fn people_are_shown_names() {
        let (a, b) = (peer("a"), peer("b"));
        let text = format!("it runs at {}@10.0.0.1:7070, not at {}@b:1", a.key, b.key);
        let book = Book::of(vec![a]);
        let shown = format!("it runs at a at 10.0.0.1:7070, not at {}@b:1", b.key);
        assert_eq!(book.name_all(&text), shown);
    }

    #[test]
    fn rights_end() {
        let once = Peer { until: Some(1), ..peer("a") };
        assert!(once.check(Right::Send).unwrap_err().message.contains("over"));
        let later = Peer { until: Some(u64::MAX), ..peer("a") };
        later.check(Right::Receive).unwrap();
        let sender = Peer { rights: "send".parse().unwrap(), ..peer("a") };
        sender.check(Right::Send).unwrap();
        sender.check(Right::Receive).unwrap_err();
        let watcher = Peer { rights: "observe".parse().unwrap(), ..peer("a") };
        watcher.check(Right::Observe).unwrap();
        watcher.check(Right::Operate).unwrap_err();
        let operator = Peer { rights: "operate".parse().unwrap(), ..peer("a") };
        operator.check(Right::Observe).unwrap();
        operator.check(Right::Operate).unwrap();
        operator.check(Right::Send).unwrap_err();
        for bad in ["", "all", "send,", "send receive"] {
            bad.parse::<Rights>().unwrap_err();
        }
    }

    #[test]
    fn bases_are_known_by_id_and_by_name() {
        let (web, other) = (BaseId([1; 32]), BaseId([2; 32]));
        let id_of = |name: &str| (name == "web").then_some(web);
        let any = peer("a");
        assert!(any.allows_base(other, id_of));
        for listed in ["web".to_owned(), web.to_string()] {
            let one = Peer { bases: Some(vec![listed]), ..peer("a") };
            assert!(one.allows_base(web, id_of) && !one.allows_base(other, id_of));
        }
        let none = Peer { bases: Some(Vec::new()), ..any };
        assert!(!none.allows_base(web, id_of));
    }
}
