//! This cloudlet's key pair, in a file.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use handoff::tls::Identity;
use zeroize::Zeroizing;

use crate::{
    failure::{Exit, Failure},
    home::{Home, sync_parent},
};

/// No key file is longer.
const MAX_PEM_BYTES: u64 = 4 << 10;
/// Bits of a mode that let others than the owner in.
const OTHERS: u32 = 0o077;

/// This cloudlet's key pair, which is made if there is none.
pub(crate) fn identity(home: &Home) -> Result<Arc<Identity>, Failure> {
    let path = home.identity();
    loop {
        match load(&path) {
            Err(failure) if failure.exit == Exit::NotFound => make(home, &path)?,
            loaded => return loaded.map(Arc::new),
        }
    }
}

fn load(path: &Path) -> Result<Identity, Failure> {
    let failed = |e: io::Error| Failure::file("read", path, &e);
    let file = fs::File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode();
    if mode & OTHERS != 0 {
        let why = format!("others may read or change it (mode {:o})", mode & 0o7777);
        let way_out = format!(
            "`chmod 600 {0}`; or, if others have seen it, `rm {0}`, and peers \
            pin the new key",
            path.display()
        );
        return Err(Failure::new(Exit::Corrupt, path.display(), why, way_out));
    }
    let mut pem = Zeroizing::new(Vec::new());
    file.take(MAX_PEM_BYTES).read_to_end(&mut pem).map_err(failed)?;
    Identity::from_pem(&pem).map_err(|e| {
        let way_out = "restore it, or remove it: then a new key is made, which peers must pin";
        Failure::new(Exit::Corrupt, path.display(), e, way_out)
    })
}

/// Makes a key. Of two processes that do, one is first, and both use its key.
fn make(home: &Home, path: &Path) -> Result<(), Failure> {
    let made =
        Identity::generate().map_err(|e| Failure::plain(Exit::Failed, "this cloudlet's key", e))?;
    home.create()?;
    // Threads of one process would have one draft.
    static MAKING: Mutex<()> = Mutex::new(());
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let failed = |e: io::Error| Failure::file("write", path, &e);
    // For its owner alone from the first byte on.
    let mut draft = tempfile::NamedTempFile::new_in(home.root()).map_err(failed)?;
    draft.write_all(made.to_pem().as_bytes()).map_err(failed)?;
    draft.as_file().sync_all().map_err(failed)?;
    match draft.persist_noclobber(path) {
        Err(e) if e.error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e.error)),
        _ => {}
    }
    sync_parent(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::new(&root.path().join("home")).unwrap();
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..4).map(|_| scope.spawn(|| identity(&home).unwrap().key())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == identity(&home).unwrap().key()), "{keys:?}");
        let mode = fs::metadata(home.identity()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(home.root()).unwrap().count(), 1, "a draft was left");
    }

    #[test]
    fn a_key_that_others_can_read_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::new(root.path()).unwrap();
        identity(&home).unwrap();
        fs::set_permissions(home.identity(), fs::Permissions::from_mode(0o640)).unwrap();
        let failure = identity(&home).unwrap_err();
        assert!(failure.message.contains("mode 640"), "{failure}");
        fs::set_permissions(home.identity(), fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(home.identity(), "no key").unwrap();
        assert_eq!(identity(&home).unwrap_err().exit, Exit::Corrupt);
    }
}
