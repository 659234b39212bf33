//! The tree as a file system: numbers and places first, then the content of its files, layer by layer.

use std::{collections::BTreeMap, fs::File, io, io::Read, mem};

use super::{
    OciError,
    layer::Take,
    tree::{Id, Node, Source, Tree},
};
use crate::{
    files,
    image::{
        mkfs::{self, BLOCK_BYTES, Content, Label, MkfsError, Run},
        tar::{Entry, Kind, shown},
    },
};

/// What is read and written at once.
const BUFFER_BYTES: usize = 1 << 20;
const LOST_AND_FOUND: &str = "lost+found";

/// Where a file's content has to go.
#[derive(Debug)]
struct Place {
    bytes: u64,
    runs: Vec<Run>,
}

/// Contents that are still to come, by layer and entry.
#[derive(Debug, Default)]
pub(super) struct Places(BTreeMap<(usize, u64), Place>);

/// What has a number: in the order of numbers, but for the first two.
#[derive(Debug, Default)]
struct Plan {
    /// Each with the number of the directory that it is in.
    order: Vec<(Id, u32)>,
    /// By id; 0 is none.
    numbers: Vec<u32>,
    links: Vec<u32>,
}

impl Plan {
    fn of(tree: &mut Tree) -> Result<Self, OciError> {
        let lost = tree.directory_in_root(LOST_AND_FOUND)?;
        let mut plan =
            Self { order: Vec::new(), numbers: vec![0; tree.len()], links: vec![0; tree.len()] };
        let mut next = mkfs::FIRST;
        plan.number(Tree::ROOT, mkfs::ROOT, mkfs::ROOT);
        plan.number(lost, mkfs::LOST_AND_FOUND, mkfs::ROOT);
        let mut at = 0;
        // Directory after directory, so that what is in one has numbers in a row.
        while let Some((id, _)) = plan.order.get(at).copied() {
            at += 1;
            let Some((_, Node::Directory(children))) = tree.get(id) else { continue };
            let number = plan.numbers.get(id).copied().unwrap_or_default();
            // Its own two names, and one for each directory in it.
            plan.add_links(id, if id == Tree::ROOT { 2 } else { 1 });
            for child in children.values() {
                plan.add_links(child.id, 1);
                if let Some((_, Node::Directory(_))) = tree.get(child.id) {
                    plan.add_links(id, 1);
                }
                if plan.numbers.get(child.id) == Some(&0) {
                    plan.number(child.id, next, number);
                    next += 1;
                }
            }
        }
        Ok(plan)
    }

    fn number(&mut self, id: Id, number: u32, parent: u32) {
        if let Some(place) = self.numbers.get_mut(id) {
            *place = number;
            self.order.push((id, parent));
        }
    }

    fn add_links(&mut self, id: Id, more: u32) {
        if let Some(links) = self.links.get_mut(id) {
            *links += more;
        }
    }
}

/// Writes a file system with this tree to an empty file, but for what the layers have of it.
pub(super) fn write_tree(
    tree: &mut Tree,
    to: &File,
    bytes: u64,
    label: Label,
) -> Result<Places, OciError> {
    let plan = Plan::of(tree)?;
    let failed = |error: MkfsError, what: &str| match error {
        MkfsError::Io(error) => OciError::Write(error),
        MkfsError::Full => OciError::Full { mib: bytes >> 20 },
        error => OciError::File { path: what.to_owned(), why: error.to_string() },
    };
    let inodes = u32::try_from(plan.order.len()).unwrap_or(u32::MAX).saturating_add(mkfs::FIRST);
    let mut fs = mkfs::Mkfs::new(to, bytes, inodes, label).map_err(|e| failed(e, "the disk"))?;
    let (mut places, mut own) = (Places::default(), Vec::new());
    for (id, parent) in &plan.order {
        let Some((meta, node)) = tree.get(*id) else { continue };
        let number = |id: Id| plan.numbers.get(id).copied().unwrap_or_default();
        let links = plan.links.get(*id).copied().unwrap_or_default();
        let mut entries = Vec::new();
        let content = match node {
            Node::File { bytes, .. } => Content::File { bytes: *bytes },
            Node::Directory(children) => {
                entries.extend(children.iter().filter_map(|(name, child)| {
                    let kind = kind_of(&tree.get(child.id)?.1);
                    Some(mkfs::Entry { number: number(child.id), kind, name })
                }));
                Content::Directory { parent: *parent, entries: &entries }
            }
            Node::Symlink(target) => Content::Symlink(target),
            Node::Device { is_block, major, minor } => {
                Content::Device { is_block: *is_block, major: *major, minor: *minor }
            }
            Node::Fifo => Content::Fifo,
        };
        let runs = fs.add(number(*id), links, meta, content);
        let runs = runs.map_err(|error| failed(error, &path_of(tree, *id)))?;
        if let Node::File { bytes, source } = node
            && *bytes > 0
        {
            match source {
                Source::Layer { layer, entry } => {
                    places.0.insert((*layer, *entry), Place { bytes: *bytes, runs });
                }
                Source::Own(_) => own.push((*id, runs)),
            }
        }
    }
    for (id, runs) in own {
        let content = tree.take_own(id).unwrap_or_default();
        let place = Place { bytes: content.len() as u64, runs };
        write_content(to, &place, &mut content.as_slice())?;
    }
    fs.finish().map_err(|error| failed(error, "the disk"))?;
    Ok(places)
}

fn kind_of(node: &Node) -> mkfs::Kind {
    match node {
        Node::File { .. } => mkfs::Kind::File,
        Node::Directory(_) => mkfs::Kind::Directory,
        Node::Symlink(_) => mkfs::Kind::Symlink,
        Node::Device { is_block: true, .. } => mkfs::Kind::BlockDevice,
        Node::Device { is_block: false, .. } => mkfs::Kind::CharDevice,
        Node::Fifo => mkfs::Kind::Fifo,
    }
}

/// A name of something, for an error: looked for where it is needed, which is seldom.
fn path_of(tree: &Tree, wanted: Id) -> String {
    let mut ahead = vec![(Tree::ROOT, String::new())];
    while let Some((id, path)) = ahead.pop() {
        let Some((_, Node::Directory(children))) = tree.get(id) else { continue };
        for (name, child) in children {
            let path = format!("{path}/{}", shown(name));
            if child.id == wanted {
                return path;
            }
            ahead.push((child.id, path));
        }
    }
    "/".into()
}

/// Writes the contents of one layer's files to where they belong.
pub(super) struct Fill<'a> {
    to: &'a File,
    layer: usize,
    places: BTreeMap<u64, Place>,
}

impl<'a> Fill<'a> {
    /// What a layer has to bring; `None` if that is nothing.
    pub(super) fn new(to: &'a File, layer: usize, places: &mut Places) -> Option<Self> {
        // The layers come in order: those of later ones stay.
        let later = places.0.split_off(&(layer + 1, 0));
        let own = mem::replace(&mut places.0, later);
        let places: BTreeMap<_, _> =
            own.into_iter().map(|((_, entry), place)| (entry, place)).collect();
        if places.is_empty() { None } else { Some(Self { to, layer, places }) }
    }

    /// All of it came.
    pub(super) fn finish(self) -> Result<(), OciError> {
        if self.places.is_empty() { Ok(()) } else { Err(OciError::Changed(self.layer + 1)) }
    }
}

impl Take for Fill<'_> {
    fn take(
        &mut self,
        number: u64,
        entry: Entry,
        content: &mut dyn Read,
    ) -> Result<bool, OciError> {
        let Some(place) = self.places.remove(&number) else { return Ok(true) };
        if entry.kind != Kind::File(place.bytes) {
            return Err(OciError::Changed(self.layer + 1));
        }
        write_content(self.to, &place, content)?;
        Ok(!self.places.is_empty())
    }
}

/// Writes what is not zero of a content; the rest is zero already.
fn write_content(to: &File, place: &Place, content: &mut dyn Read) -> Result<(), OciError> {
    let mut left = place.bytes;
    let mut buffer = vec![0; BUFFER_BYTES.min(left.next_multiple_of(BLOCK_BYTES) as usize)];
    for run in &place.runs {
        let (mut at, end) = (run.start * BLOCK_BYTES, (run.start + run.blocks) * BLOCK_BYTES);
        while at < end && left > 0 {
            let most = (end - at).min(left).min(buffer.len() as u64) as usize;
            let Some(now) = buffer.get_mut(..most) else { break };
            content.read_exact(now).map_err(OciError::Content)?;
            files::write_sparse(to, at, now).map_err(OciError::Write)?;
            at += most as u64;
            left -= most as u64;
        }
    }
    if left == 0 { Ok(()) } else { Err(OciError::Content(io::ErrorKind::UnexpectedEof.into())) }
}
