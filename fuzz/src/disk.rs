//! A small base in files, as a store has it.

use std::{
    fs,
    path::Path,
    sync::{Arc, LazyLock},
};

use guest_images::{Base, BaseId, CHUNK_SIZE, ImportSpec, Store, chunk::ZERO_CHUNK};

use crate::{scratch::Scratch, world::chunk};

/// Whole chunks of the base's disk.
pub const WHOLE_CHUNKS: u64 = 11;
/// Bytes of the base's disk: its last chunk is cut at two sectors.
pub const DISK_BYTES: usize = WHOLE_CHUNKS as usize * CHUNK_SIZE + 1024;
/// What it is called.
const NAME: &str = "small";

/// The base disk's content: two chunks of it are zero, and two are the same.
pub fn disk() -> Vec<u8> {
    let numbers = [1, 2, 0, 3, 4, 4, 5, 0, 6, 7, 8, 9];
    let chunks = numbers.map(|n| if n == 0 { *ZERO_CHUNK } else { chunk(n) });
    let mut disk = chunks.concat();
    disk.truncate(DISK_BYTES);
    disk
}

/// Imports the base into `dir`.
fn import(dir: &Scratch) -> (Store, BaseId) {
    // The head of an ELF file for x86-64 is all that an import looks at.
    let mut kernel = vec![0x90; 5000];
    kernel[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    kernel[16..20].copy_from_slice(&[2, 0, 62, 0]);
    let spec = ImportSpec {
        name: NAME.into(),
        disk: dir.file("disk", &disk()),
        kernel: dir.file("kernel", &kernel),
        initramfs: Some(dir.file("initramfs", &[0x30; 5000])),
        cmdline: "console=ttyS0".into(),
        memory: None,
    };
    let store = Store::open(&dir.path().join("store")).expect("a store");
    let id = store.import(&spec, &mut |_| {}).expect("an import");
    (store, id)
}

/// The base, open; its files have no names any more.
pub fn base() -> Arc<Base> {
    static BASE: LazyLock<Arc<Base>> = LazyLock::new(|| {
        let dir = Scratch::new();
        let (store, id) = import(&dir);
        Arc::new(store.get_id(&id).expect("the base"))
    });
    BASE.clone()
}

/// Names and contents.
pub type Files = Vec<(String, Vec<u8>)>;

/// The base's id, and its files.
pub fn files() -> &'static (BaseId, Files) {
    static FILES: LazyLock<(BaseId, Files)> = LazyLock::new(|| {
        let dir = Scratch::new();
        let (store, id) = import(&dir);
        let base = store.get_id(&id).expect("the base");
        (id, files_of(base.dir()))
    });
    &FILES
}

fn files_of(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).expect("the base's directory");
    let mut files: Vec<_> = entries
        .map(|entry| {
            let entry = entry.expect("an entry of it");
            let content = fs::read(entry.path()).expect("a file of the base");
            (entry.file_name().to_string_lossy().into_owned(), content)
        })
        .collect();
    files.sort();
    files
}
