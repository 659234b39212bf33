//! Executables and the shared libraries they need.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::cpio::CpioWriter;

/// Directories searched for tools; `sbin` is not in every user's PATH.
const TOOL_DIRS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Finds an installed tool.
pub(crate) fn find_tool(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = env::split_paths(&path).chain(TOOL_DIRS.iter().map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Adds the executable `from` as `to`, with its libraries.
pub(crate) fn add_executable<W: Write>(
    cpio: &mut CpioWriter<W>,
    from: &Path,
    to: &Path,
) -> Result<()> {
    let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    cpio.file(to, 0o755, &data)?;
    add_libraries(cpio, from)
}

/// Adds the libraries that `executable` needs, at the paths at which it will look for them.
pub(crate) fn add_libraries<W: Write>(cpio: &mut CpioWriter<W>, executable: &Path) -> Result<()> {
    for library in libraries(executable)? {
        let data = fs::read(&library)
            .with_context(|| format!("cannot read the library {}", library.display()))?;
        cpio.file(&library, 0o755, &data)?;
    }
    Ok(())
}

/// The dynamic executables below `dir`, so that their libraries can come along.
pub(crate) fn executables_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        let entries =
            fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                pending.push(entry.path());
            } else if kind.is_file() && is_elf_executable(&entry.path())? {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// Whether a file can be executed and is ELF, not a script.
pub(crate) fn is_elf_executable(path: &Path) -> Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    let meta = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if meta.permissions().mode() & 0o111 == 0 {
        return Ok(false);
    }
    let mut magic = [0; 4];
    let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Ok(()) => Ok(&magic == b"\x7fELF"),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// What the dynamic loader would load for `executable`: nothing when it is static.
fn libraries(executable: &Path) -> Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd")
        .arg(executable)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .context("cannot run ldd: install the package libc-bin")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    if text.contains("statically linked") || complaint.contains("not a dynamic executable") {
        return Ok(BTreeSet::new());
    }
    if !output.status.success() {
        bail!("ldd {}: {}", executable.display(), complaint.trim());
    }
    parse_ldd(&text).with_context(|| format!("{}", executable.display()))
}

/// Lines read `name => /path (address)`, `/path (address)`, or name nothing on disk (the vDSO).
fn parse_ldd(text: &str) -> Result<BTreeSet<PathBuf>> {
    let mut libraries = BTreeSet::new();
    for line in text.lines() {
        let line = line.trim();
        let place = line.split_once(" => ").map_or(line, |(_, place)| place);
        if place.starts_with("not found") {
            bail!("its library is not installed: {line}");
        }
        if let Some(path) = place.split(" (").next().filter(|path| path.starts_with('/')) {
            libraries.insert(PathBuf::from(path));
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output_names_files_only() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                    \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found = parse_ldd(text).unwrap();
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(found, expected.iter().map(PathBuf::from).collect());
    }

    #[test]
    fn a_missing_library_is_an_error() {
        let error = parse_ldd("\tlibodd.so.3 => not found\n").unwrap_err().to_string();
        assert!(error.contains("libodd.so.3"), "{error}");
    }
}
