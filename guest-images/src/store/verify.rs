//! Reading a whole base again and saying what is wrong where.

use std::{fs::File, path::PathBuf};

use super::{Progress, Store, StoreError};
use crate::{
    base::{Base, BaseError, BaseId, Part},
    index::{self, Entry},
    manifest::PartRoot,
    scan::{Scan, ScanError, slab_range},
};

/// How many damaged chunks a [`Problem::Root`] names.
pub const MAX_NAMED_CHUNKS: usize = 16;

/// One thing that is wrong with a base.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It cannot even be opened.
    #[error(transparent)]
    Unusable(BaseError),
    /// A part cannot be read to its end.
    #[error("reading {path}: {source}")]
    Unreadable {
        /// The part's file.
        path: PathBuf,
        /// What came of it.
        source: std::io::Error,
    },
    /// A part's content is not what the manifest names.
    #[error("{path}: the content's root is {found}, the manifest says {expected}; {}", damaged(.chunks))]
    Root {
        /// The part's file.
        path: PathBuf,
        /// The root in the manifest.
        expected: PartRoot,
        /// The root of what is there.
        found: PartRoot,
        /// The chunks that are damaged, as far as the index can tell; at most
        /// [`MAX_NAMED_CHUNKS`].
        chunks: Vec<u64>,
    },
    /// The machine state cannot be read or is not what the manifest names.
    #[error("the machine state of base {id}: {source}")]
    Machine {
        /// The base.
        id: BaseId,
        /// What came of reading it.
        source: std::io::Error,
    },
    /// The index's entries are not those of the parts, though its header is sound.
    #[error(
        "{path}: entry {entry} (of {entries}) is not what the parts give: chunks will not be found; import the base again"
    )]
    Index {
        /// The index.
        path: PathBuf,
        /// The first wrong entry.
        entry: u64,
        /// How many it has.
        entries: u64,
    },
}

fn damaged(chunks: &[u64]) -> String {
    let list = chunks.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    match chunks.len() {
        0 => "which chunks cannot be told".to_owned(),
        1 => format!("damaged is chunk {list}"),
        MAX_NAMED_CHUNKS => format!("damaged are chunks {list} and perhaps more"),
        _ => format!("damaged are chunks {list}"),
    }
}

impl Store {
    /// Reads every part and the index of a base, and returns all that is wrong; nothing if it is
    /// sound. An error means that the check itself could not be made.
    pub fn verify(
        &self,
        id: &BaseId,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Problem>, StoreError> {
        if !self.contains(id) {
            return Err(self.not_found(&id.to_string()));
        }
        let base = match Base::open(&self.base_dir(id)) {
            Ok(base) => base,
            Err(error) => return Ok(vec![Problem::Unusable(error)]),
        };
        let mut problems = Vec::new();
        let mut entries = Vec::new();
        for part in Part::ALL {
            if let Some(file) = base.part_file(part) {
                problems.extend(check_part(&base, part, file, &mut entries, progress));
            }
        }
        // With a damaged part the index cannot match, and is not to blame.
        if problems.is_empty() {
            index::sort(&mut entries);
            problems.extend(base.index().first_difference(&entries).map(|entry| Problem::Index {
                path: base.index_path(),
                entry,
                entries: base.index().len(),
            }));
        }
        if let Err(source) = base.machine() {
            problems.push(Problem::Machine { id: *id, source });
        }
        Ok(problems)
    }
}

/// Checks one part; appends its entries in order of place.
fn check_part(
    base: &Base,
    part: Part,
    file: &File,
    entries: &mut Vec<Entry>,
    progress: &mut dyn FnMut(Progress),
) -> Option<Problem> {
    let path = base.dir().join(part.file_name());
    let info = base.manifest().part(part)?;
    let from = entries.len();
    let total_bytes = info.bytes;
    let scan = Scan { part, source: file, bytes: total_bytes, copy: None, known: None };
    let scanned = scan.run(&mut |slab| {
        let done_bytes = slab_range(slab.number, total_bytes).end;
        entries.extend(slab.entries);
        progress(Progress { part, done_bytes, total_bytes });
        Ok(())
    });
    match scanned {
        Ok(found) if found == info.root => None,
        Ok(found) => {
            let chunks = find_damage(base, part, entries.get(from..).unwrap_or_default());
            Some(Problem::Root { path, expected: info.root, found, chunks })
        }
        Err(ScanError::Read(source) | ScanError::Write(source)) => {
            Some(Problem::Unreadable { path, source })
        }
    }
}

/// The chunks of a part that the index, if sound, shows to be damaged: those whose content it does
/// not know, and those where it knows another content.
fn find_damage(base: &Base, part: Part, present: &[Entry]) -> Vec<u64> {
    let index = base.index();
    if !index.entries_intact() {
        return Vec::new();
    }
    let unknown = present
        .iter()
        .filter(|entry| index.find(entry.hash()).is_none())
        .filter_map(|entry| entry.place());
    let replaced = index.entries().filter_map(|entry| {
        let place = entry.place().filter(|place| place.part == part)?;
        let at = present.binary_search_by_key(&Some(place), |present| present.place());
        let now = at.ok().and_then(|at| present.get(at));
        now.is_none_or(|now| now.hash() != entry.hash()).then_some(place)
    });
    // A set, kept small: what is beyond the limit is let go from its end.
    let mut chunks = std::collections::BTreeSet::new();
    for place in unknown.chain(replaced) {
        chunks.insert(place.index);
        if chunks.len() > MAX_NAMED_CHUNKS {
            chunks.pop_last();
        }
    }
    chunks.into_iter().collect()
}
