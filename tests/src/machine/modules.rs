//! Which kernel modules a lab host needs, and in which order they load.
//!
//! A kernel package that was only unpacked has no `modules.dep` (`depmod` writes it when a package
//! is installed), so dependencies are read from where `depmod` has them from: the `depends=` entry
//! in the `.modinfo` of each module.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Why modules could not be gathered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    /// A module is neither in the tree nor built in.
    #[error("kernel module {name} (needed by {needed_by}) is not in {}", tree.display())]
    Missing {
        /// The module.
        name: String,
        /// A module or "the lab".
        needed_by: String,
        /// The tree searched.
        tree: PathBuf,
    },
    /// Modules need each other.
    #[error("kernel module {0} depends on itself")]
    Cycle(String),
    /// A file is not a module.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Reading failed.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A module, ready to be loaded: decompressed where it was compressed.
pub(crate) struct Module {
    /// Name with underscores, as `lsmod` shows it.
    pub(crate) name: String,
    /// Path below the module tree, with the suffix `.ko`.
    pub(crate) path: PathBuf,
    /// Names of the modules that must be loaded before it.
    pub(crate) depends: Vec<String>,
    /// The ELF file.
    pub(crate) data: Vec<u8>,
}

/// The modules of one kernel: `lib/modules/VERSION`.
pub(crate) struct ModuleTree {
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl ModuleTree {
    /// Lists the modules below `root`.
    pub(crate) fn open(root: &Path) -> Result<Self, ModuleError> {
        let mut files = BTreeMap::new();
        collect(&root.join("kernel"), &mut files)?;
        let builtin = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { root: root.to_owned(), files, builtin })
    }

    /// All of `names` and what they depend on, in an order in which they can be loaded. Modules
    /// built into the kernel are left out.
    pub(crate) fn resolve(&self, names: &[&str]) -> Result<Vec<Module>, ModuleError> {
        let mut order = Vec::new();
        for name in names {
            self.visit(name, "the lab", &mut Vec::new(), &mut order)?;
        }
        Ok(order)
    }

    /// Whether a module of this name is there or built in.
    pub(crate) fn has(&self, name: &str) -> bool {
        let name = name.replace('-', "_");
        self.files.contains_key(&name) || self.builtin.contains(&name)
    }

    fn visit(
        &self,
        name: &str,
        needed_by: &str,
        path: &mut Vec<String>,
        order: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        let name = name.replace('-', "_");
        if order.iter().any(|module| module.name == name) || self.builtin.contains(&name) {
            return Ok(());
        }
        if path.contains(&name) {
            return Err(ModuleError::Cycle(name));
        }
        let Some(file) = self.files.get(&name) else {
            let (needed_by, tree) = (needed_by.to_owned(), self.root.clone());
            return Err(ModuleError::Missing { name, needed_by, tree });
        };
        let data = read_module(file)?;
        let depends = depends(&data)
            .map_err(|problem| ModuleError::Malformed { path: file.clone(), problem })?;
        path.push(name.clone());
        for dependency in &depends {
            self.visit(dependency, &name, path, order)?;
        }
        path.pop();
        let below = file.strip_prefix(&self.root).unwrap_or(file);
        let path = below.with_file_name(format!("{}.ko", file_stem(file)));
        order.push(Module { name, path, depends, data });
        Ok(())
    }
}

fn collect(dir: &Path, into: &mut BTreeMap<String, PathBuf>) -> Result<(), ModuleError> {
    let failed = |source| ModuleError::Read { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            collect(&path, into)?;
        } else if let Some(name) = module_name(&path) {
            into.insert(name, path);
        }
    }
    Ok(())
}

/// `kvm-amd.ko.xz` is the module `kvm_amd`; other files are none.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, compression) = name.split_once(".ko")?;
    matches!(compression, "" | ".xz" | ".zst").then(|| stem.replace('-', "_"))
}

fn file_stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split_once(".ko").map_or_else(|| name.to_string(), |(stem, _)| stem.to_owned())
}

fn read_module(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let failed = |source| ModuleError::Read { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut data = Vec::new();
    match path.extension().and_then(|suffix| suffix.to_str()) {
        Some("xz") => xz2::read::XzDecoder::new(file).read_to_end(&mut data),
        Some("zst") => zstd::Decoder::new(file).and_then(|mut zst| zst.read_to_end(&mut data)),
        _ => { file }.read_to_end(&mut data),
    }
    .map_err(failed)?;
    Ok(data)
}

/// Reads the `depends=` entry of a module's `.modinfo` section.
fn depends(elf: &[u8]) -> Result<Vec<String>, &'static str> {
    let modinfo = section(elf, b".modinfo")?;
    for entry in modinfo.split(|byte| *byte == 0) {
        if let Some(list) = entry.strip_prefix(b"depends=") {
            let list = std::str::from_utf8(list).map_err(|_| "its depends= is not text")?;
            let names = list.split(',').filter(|name| !name.is_empty());
            return Ok(names.map(|name| name.replace('-', "_")).collect());
        }
    }
    Err("no depends= in its .modinfo section: not a kernel module")
}

/// Finds a section of a 64-bit little-endian ELF file.
fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Result<&'a [u8], &'static str> {
    const TRUNCATED: &str = "truncated ELF file";
    const SECTION_HEADER_BYTES: u64 = 64;
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        return Err("not a 64-bit little-endian ELF file");
    }
    let number = |at: u64, bytes: usize| -> Result<u64, &'static str> {
        let at = usize::try_from(at).map_err(|_| TRUNCATED)?;
        let field = elf.get(at..).and_then(|rest| rest.get(..bytes)).ok_or(TRUNCATED)?;
        Ok(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let (table, count, names_index) = (number(40, 8)?, number(60, 2)?, number(62, 2)?);
    let header = |index: u64| table.checked_add(index * SECTION_HEADER_BYTES).ok_or(TRUNCATED);
    let content = |header: u64| -> Result<&'a [u8], &'static str> {
        let field = |offset: u64| number(header.checked_add(offset).ok_or(TRUNCATED)?, 8);
        let start = usize::try_from(field(24)?).map_err(|_| TRUNCATED)?;
        let size = usize::try_from(field(32)?).map_err(|_| TRUNCATED)?;
        elf.get(start..).and_then(|rest| rest.get(..size)).ok_or(TRUNCATED)
    };
    let names = content(header(names_index)?)?;
    for index in 0..count {
        let header = header(index)?;
        let name_at = usize::try_from(number(header, 4)?).map_err(|_| TRUNCATED)?;
        let name = names.get(name_at..).and_then(|rest| rest.split(|byte| *byte == 0).next());
        if name == Some(wanted) {
            return content(header);
        }
    }
    Err("it has no .modinfo section: not a kernel module")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with a `.modinfo` and a section name table, and nothing else.
    fn module(modinfo: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let (modinfo_at, names_at) = (64u64, 64 + modinfo.len() as u64);
        let table_at = names_at + names.len() as u64;
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[40..48].copy_from_slice(&table_at.to_le_bytes());
        elf[60..62].copy_from_slice(&3u16.to_le_bytes());
        elf[62..64].copy_from_slice(&2u16.to_le_bytes());
        elf.extend_from_slice(modinfo.as_bytes());
        elf.extend_from_slice(names);
        elf.extend_from_slice(&[0; 64]);
        for (name, at, size) in [(1u32, modinfo_at, modinfo.len()), (10, names_at, names.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&at.to_le_bytes());
            header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend_from_slice(&header);
        }
        elf
    }

    /// A module tree in a temporary directory; each pair is a file and its `depends=`.
    fn tree(modules: &[(&str, &str)]) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("kernel/some/where")).unwrap();
        for (file, depends) in modules {
            let data = module(&format!("license=GPL\0depends={depends}\0"));
            let data = if file.ends_with(".zst") {
                zstd::encode_all(data.as_slice(), 1).unwrap()
            } else {
                data
            };
            fs::write(dir.path().join("kernel/some/where").join(file), data).unwrap();
        }
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/ext4/mb-cache.ko\n").unwrap();
        let tree = ModuleTree::open(dir.path()).unwrap();
        (dir, tree)
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn what_is_needed_loads_first_and_once() {
        let (_dir, tree) = tree(&[
            ("kvm-amd.ko", "kvm,ccp"),
            ("kvm.ko.zst", "irqbypass"),
            ("irqbypass.ko", ""),
            ("ccp.ko", "mb-cache"),
            ("unneeded.ko", ""),
        ]);
        let order = tree.resolve(&["kvm-amd", "kvm"]).unwrap();
        assert_eq!(names(&order), ["irqbypass", "kvm", "ccp", "kvm_amd"]);
        assert_eq!(order[1].path, Path::new("kernel/some/where/kvm.ko"));
        assert_eq!(&order[1].data[..4], b"\x7fELF", "compressed modules come out decompressed");
        assert!(tree.has("kvm-amd") && tree.has("mb_cache") && !tree.has("vfat"));
    }

    #[test]
    fn a_missing_module_is_named_with_who_needs_it() {
        let (_dir, tree) = tree(&[("bridge.ko", "stp")]);
        let error = tree.resolve(&["bridge"]).err().unwrap().to_string();
        assert!(error.contains("stp") && error.contains("bridge"), "{error}");
    }

    #[test]
    fn a_cycle_ends() {
        let (_dir, tree) = tree(&[("a.ko", "b"), ("b.ko", "a")]);
        assert!(matches!(tree.resolve(&["a"]), Err(ModuleError::Cycle(_))));
    }

    #[test]
    fn damaged_modules_are_errors() {
        let good = module("depends=a\0");
        assert_eq!(depends(&good).unwrap(), ["a"]);
        // The last 24 bytes of the last section header are fields that are not read.
        for cut in 0..good.len() - 24 {
            assert!(depends(&good[..cut]).is_err(), "cut at {cut}");
        }
        assert!(depends(&module("license=GPL\0")).is_err());
    }
}
