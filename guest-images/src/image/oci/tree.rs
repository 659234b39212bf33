//! What layers add up to: a tree of files in memory, without their content.
//!
//! Paths are walked here and nowhere else, in this tree: a link in it leads to somewhere in it, whatever it says, and
//! `..` in the path of an entry is refused.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    mem,
};

use crate::image::{
    mkfs::{MAX_LINK_BYTES, MAX_NAME_BYTES, Meta},
    tar::{self, Entry, Kind, shown},
};

/// Files, directories and all else, also those that a later layer takes away again.
pub(super) const MAX_NODES: usize = 1 << 20;
/// What their names, targets and attributes have together.
const MAX_TEXT_BYTES: usize = 256 << 20;
/// The longest path of an entry.
const MAX_PATH_BYTES: usize = 4096;
/// Symbolic links on the way to a file, and steps: as Linux has it, about.
const MAX_LINKS: usize = 40;
const MAX_STEPS: usize = 1000;
/// Steps on the way to all files together: some seconds.
const MAX_ALL_STEPS: u64 = 1 << 28;
/// What the name of a whiteout begins with: what follows is not there any more.
const WHITEOUT: &[u8] = b".wh.";
/// What one begins with that stands for something else.
const SPECIAL: &[u8] = b".wh..wh.";
/// Nothing of the layers below is in this directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why an entry has no place in the tree.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// It wants out, or cannot be a path.
    #[error("{path} {why}")]
    Path {
        /// The entry.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// It is another name for nothing.
    #[error("{path} is another name of {target}, which is no file of the image")]
    Target {
        /// The entry.
        path: String,
        /// What it wants to be.
        target: String,
    },
    /// There are too many of it.
    #[error("it has more than {MAX_NODES} files")]
    Files,
    /// It says too much.
    #[error("names and attributes of its files have more than {} MiB", MAX_TEXT_BYTES >> 20)]
    Text,
}

/// Where in the tree's list something is.
pub(super) type Id = usize;

/// Where a file's content is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// That of an entry of a layer, both counted from zero.
    Layer { layer: usize, entry: u64 },
    /// Not in the image.
    Own(Vec<u8>),
}

/// What is in the tree.
#[derive(Debug)]
pub(super) enum Node {
    File { bytes: u64, source: Source },
    Directory(BTreeMap<Box<[u8]>, Child>),
    Symlink(Vec<u8>),
    Device { is_block: bool, major: u32, minor: u32 },
    Fifo,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    pub(super) id: Id,
    /// The last layer that had it, or something in it.
    layer: usize,
}

/// The tree.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<(Meta, Node)>,
    text_bytes: usize,
    /// The layer that is being applied, and the directories that hold nothing of others any more.
    layer: usize,
    opaque: HashSet<Id>,
    /// Steps that may yet be taken.
    steps: Cell<u64>,
    /// Extended attributes that are not in the tree.
    pub(super) left_out: u64,
}

/// How far a path leads.
#[derive(Debug)]
struct Walk {
    /// From the root on, each with its name in the one before.
    trail: Vec<(Id, Vec<u8>)>,
    /// What is not there, the next step last.
    missing: Vec<Vec<u8>>,
}

impl Walk {
    fn end(&self) -> Id {
        self.trail.last().map_or(Tree::ROOT, |(id, _)| *id)
    }
}

impl Tree {
    pub(super) const ROOT: Id = 0;

    /// An empty one.
    pub(super) fn new() -> Self {
        let root = (Meta { mode: 0o755, ..Meta::default() }, Node::Directory(BTreeMap::new()));
        Self {
            nodes: vec![root],
            text_bytes: 0,
            layer: 0,
            opaque: HashSet::new(),
            steps: Cell::new(MAX_ALL_STEPS),
            left_out: 0,
        }
    }

    /// From now on, entries are of this layer.
    pub(super) fn begin(&mut self, layer: usize) {
        self.layer = layer;
        self.opaque.clear();
    }

    pub(super) fn get(&self, id: Id) -> Option<&(Meta, Node)> {
        self.nodes.get(id)
    }

    /// The upper bound of ids.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Applies the entry of the layer that has this number in it.
    pub(super) fn apply(&mut self, entry: Entry, number: u64) -> Result<(), TreeError> {
        let Entry { path, kind, meta, left_out, .. } = entry;
        let steps = steps(&path)?;
        let Some((name, parents)) = steps.split_last() else {
            // The root itself.
            if kind == Kind::Directory {
                self.set_meta(Self::ROOT, meta)?;
            }
            return Ok(());
        };
        if parents.iter().any(|step| step.starts_with(WHITEOUT)) {
            return Err(odd(&path, "is inside of a whiteout"));
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(&path, parents, name, hidden);
        }
        let target = match &kind {
            // Looked for before anything is replaced.
            Kind::Hard(target) => Some(self.hard(&path, target)?),
            Kind::Symlink(target) if target.is_empty() || target.contains(&0) => {
                return Err(odd(&path, "is a link to nowhere"));
            }
            Kind::Symlink(target) if target.len() > MAX_LINK_BYTES => {
                return Err(odd(&path, "is a link to more than 4095 bytes"));
            }
            _ => None,
        };
        let dir = self.make_directory(&path, parents)?;
        self.left_out += left_out;
        let node = match kind {
            Kind::Hard(_) => {
                if let Some(id) = target {
                    self.insert(dir, name, id)?;
                }
                return Ok(());
            }
            Kind::Directory => {
                if let Some(id) = self.child(dir, name).map(|child| child.id)
                    && matches!(self.get(id), Some((_, Node::Directory(_))))
                {
                    self.set_meta(id, meta)?;
                    return self.insert(dir, name, id);
                }
                Node::Directory(BTreeMap::new())
            }
            Kind::File(bytes) => {
                Node::File { bytes, source: Source::Layer { layer: self.layer, entry: number } }
            }
            Kind::Symlink(target) => Node::Symlink(target),
            Kind::Device { is_block, major, minor } => Node::Device { is_block, major, minor },
            Kind::Fifo => Node::Fifo,
        };
        let id = self.add(meta, node)?;
        self.insert(dir, name, id)
    }

    /// Puts a file into the tree that no layer has.
    pub(super) fn put(
        &mut self,
        path: &str,
        meta: Meta,
        content: Vec<u8>,
    ) -> Result<(), TreeError> {
        let steps = steps(path.as_bytes())?;
        if let Some((name, parents)) = steps.split_last() {
            let dir = self.make_directory(path.as_bytes(), parents)?;
            let (bytes, source) = (content.len() as u64, Source::Own(content));
            let id = self.add(meta, Node::File { bytes, source })?;
            self.insert(dir, name, id)?;
        }
        Ok(())
    }

    /// Makes sure that the root has a directory of this name; says which it is.
    pub(super) fn directory_in_root(&mut self, name: &str) -> Result<Id, TreeError> {
        if let Some(child) = self.child(Self::ROOT, name.as_bytes())
            && matches!(self.get(child.id), Some((_, Node::Directory(_))))
        {
            return Ok(child.id);
        }
        let meta = Meta { mode: 0o700, ..Meta::default() };
        let id = self.add(meta, Node::Directory(BTreeMap::new()))?;
        self.insert(Self::ROOT, name.as_bytes(), id)?;
        Ok(id)
    }

    /// What a path leads to, links followed, and the name it has there.
    pub(super) fn find(&self, path: &str) -> Option<(Id, Vec<u8>)> {
        let steps = path.split('/').map(|step| step.as_bytes().to_vec()).collect();
        let walk = self.walk(steps).ok()?;
        if walk.missing.is_empty() { walk.trail.into_iter().next_back() } else { None }
    }

    /// The names in a directory.
    pub(super) fn names(&self, path: &str) -> impl Iterator<Item = &[u8]> {
        let id = self.find(path).map(|(id, _)| id);
        let children = match id.and_then(|id| self.get(id)) {
            Some((_, Node::Directory(children))) => Some(children),
            _ => None,
        };
        children.into_iter().flatten().map(|(name, _)| &**name)
    }

    fn child(&self, dir: Id, name: &[u8]) -> Option<Child> {
        match self.get(dir) {
            Some((_, Node::Directory(children))) => children.get(name).copied(),
            _ => None,
        }
    }

    fn children(&mut self, dir: Id) -> Option<&mut BTreeMap<Box<[u8]>, Child>> {
        match self.nodes.get_mut(dir) {
            Some((_, Node::Directory(children))) => Some(children),
            _ => None,
        }
    }

    /// Goes as far as there is something. The error is what it met instead of a directory.
    fn walk(&self, steps: Vec<Vec<u8>>) -> Result<Walk, &'static str> {
        let mut ahead = steps;
        ahead.reverse();
        let mut trail = vec![(Self::ROOT, Vec::new())];
        let (mut links, mut walked) = (0, 0);
        while let Some(name) = ahead.pop() {
            walked += 1;
            self.steps.set(self.steps.get().saturating_sub(1));
            if walked > MAX_STEPS || self.steps.get() == 0 {
                return Err("leads over too many directories");
            }
            match name.as_slice() {
                b"" | b"." => continue,
                // Above the root is the root.
                b".." => {
                    if trail.len() > 1 {
                        trail.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let here = trail.last().map_or(Self::ROOT, |(id, _)| *id);
            let Some((_, Node::Directory(children))) = self.get(here) else {
                return Err("is inside of what is no directory");
            };
            let Some(child) = children.get(name.as_slice()) else {
                ahead.push(name);
                break;
            };
            let Some((_, Node::Symlink(target))) = self.get(child.id) else {
                trail.push((child.id, name));
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Err("leads over too many symbolic links");
            }
            if target.starts_with(b"/") {
                trail.truncate(1);
            }
            ahead.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
        }
        Ok(Walk { trail, missing: ahead })
    }

    /// The directory with this path, made where it is not there yet.
    fn make_directory(&mut self, path: &[u8], parents: &[&[u8]]) -> Result<Id, TreeError> {
        let walk = self.walk(parents.iter().map(|step| step.to_vec()).collect());
        let mut walk = walk.map_err(|why| odd(path, why))?;
        // What is on the way is of this layer, too: a whiteout does not hide what is in it.
        let layer = self.layer;
        for pair in walk.trail.windows(2) {
            if let [(dir, _), (_, name)] = pair
                && let Some(child) =
                    self.children(*dir).and_then(|children| children.get_mut(name.as_slice()))
            {
                child.layer = layer;
            }
        }
        let mut dir = walk.end();
        while let Some(name) = walk.missing.pop() {
            match name.as_slice() {
                b"" | b"." => continue,
                // Of a link's target.
                b".." => return Err(odd(path, "leads through a directory that is not there")),
                _ if name.len() > MAX_NAME_BYTES => {
                    return Err(odd(path, "leads over a link with a name longer than 255 bytes"));
                }
                _ => {}
            }
            let meta = Meta { mode: 0o755, ..Meta::default() };
            let id = self.add(meta, Node::Directory(BTreeMap::new()))?;
            self.insert(dir, &name, id)?;
            dir = id;
        }
        match self.get(dir) {
            Some((_, Node::Directory(_))) => Ok(dir),
            _ => Err(odd(path, "is inside of what is no directory")),
        }
    }

    fn add(&mut self, meta: Meta, node: Node) -> Result<Id, TreeError> {
        if self.nodes.len() >= MAX_NODES {
            return Err(TreeError::Files);
        }
        if let Node::Symlink(target) = &node {
            self.count(target.len())?;
        }
        self.count_meta(&meta)?;
        self.nodes.push((meta, node));
        Ok(self.nodes.len() - 1)
    }

    fn insert(&mut self, dir: Id, name: &[u8], id: Id) -> Result<(), TreeError> {
        self.count(name.len())?;
        let child = Child { id, layer: self.layer };
        if let Some(children) = self.children(dir) {
            children.insert(name.into(), child);
        }
        Ok(())
    }

    fn set_meta(&mut self, id: Id, meta: Meta) -> Result<(), TreeError> {
        self.count_meta(&meta)?;
        if let Some((own, _)) = self.nodes.get_mut(id) {
            *own = meta;
        }
        Ok(())
    }

    fn count_meta(&mut self, meta: &Meta) -> Result<(), TreeError> {
        self.count(meta.xattrs.iter().map(|xattr| xattr.bytes()).sum())
    }

    fn count(&mut self, bytes: usize) -> Result<(), TreeError> {
        self.text_bytes = self.text_bytes.saturating_add(bytes);
        if self.text_bytes > MAX_TEXT_BYTES { Err(TreeError::Text) } else { Ok(()) }
    }

    /// The file that a hard link is another name of.
    fn hard(&self, path: &[u8], target: &[u8]) -> Result<Id, TreeError> {
        let none = || TreeError::Target { path: shown(path), target: shown(target) };
        let steps = steps(target)?;
        let (name, parents) = steps.split_last().ok_or_else(none)?;
        let walk = self.walk(parents.iter().map(|step| step.to_vec()).collect());
        let walk = walk.map_err(|why| odd(target, why))?;
        let child = self.child(walk.end(), name).filter(|_| walk.missing.is_empty());
        let child = child.ok_or_else(none)?;
        match self.get(child.id) {
            Some((_, Node::Directory(_))) | None => Err(none()),
            Some(_) => Ok(child.id),
        }
    }

    /// Takes something of the layers below away.
    fn whiteout(
        &mut self,
        path: &[u8],
        parents: &[&[u8]],
        name: &[u8],
        hidden: &[u8],
    ) -> Result<(), TreeError> {
        let is_opaque = name == OPAQUE;
        if !is_opaque && name.starts_with(SPECIAL) {
            // Notes that a kind of union leaves behind.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(odd(path, "is a whiteout of no file"));
        }
        let walk = self.walk(parents.iter().map(|step| step.to_vec()).collect());
        let walk = walk.map_err(|why| odd(path, why))?;
        if !walk.missing.is_empty() {
            return Ok(());
        }
        let dir = walk.end();
        if is_opaque {
            self.hide_below(dir);
            return Ok(());
        }
        match self.child(dir, hidden) {
            // Some of what is in it is of this layer, and stays.
            Some(child) if child.layer == self.layer => self.hide_below(child.id),
            Some(_) => {
                if let Some(children) = self.children(dir) {
                    children.remove(hidden);
                }
            }
            None => {}
        }
        Ok(())
    }

    /// Takes all of other layers out of a directory.
    fn hide_below(&mut self, dir: Id) {
        let layer = self.layer;
        let mut ahead = vec![dir];
        while let Some(dir) = ahead.pop() {
            // Once for each layer: nothing of another can come back.
            if !self.opaque.insert(dir) {
                continue;
            }
            if let Some(children) = self.children(dir) {
                children.retain(|_, child| child.layer == layer);
                ahead.extend(children.values().map(|child| child.id));
            }
        }
    }

    /// Gives a file's own content away.
    pub(super) fn take_own(&mut self, id: Id) -> Option<Vec<u8>> {
        match self.nodes.get_mut(id) {
            Some((_, Node::File { source: Source::Own(content), .. })) => Some(mem::take(content)),
            _ => None,
        }
    }
}

fn odd(path: &[u8], why: &'static str) -> TreeError {
    TreeError::Path { path: tar::shown(path), why }
}

/// The names on the way to an entry, from the root of the tree on.
fn steps(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    if path.len() > MAX_PATH_BYTES {
        return Err(odd(path, "is longer than 4096 bytes"));
    }
    let steps = path.split(|byte| *byte == b'/').filter(|step| !matches!(*step, b"" | b"."));
    steps
        .map(|step| match step {
            b".." => Err(odd(path, "leads out of the image: it has .. in it")),
            _ if step.contains(&0) => Err(odd(path, "has a zero byte in it")),
            _ if step.len() > MAX_NAME_BYTES => {
                Err(odd(path, "has a name in it that is longer than 255 bytes"))
            }
            _ => Ok(step),
        })
        .collect()
}

#[cfg(test)]
mod tests;
