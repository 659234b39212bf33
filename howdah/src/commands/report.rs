//! `howdah report`: reports as one page for people, and as tables for their plots.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
};

use howdah_report::{Evidence, MAX_FILE_BYTES};

use crate::{
    cli::ReportArgs,
    failure::{Exit, Failure},
    output::{Output, bytes},
};

/// Runs `howdah report`. Nothing is written unless every file could be read.
pub(crate) fn run(args: &ReportArgs, output: Output) -> anyhow::Result<()> {
    let mut evidence = Evidence::default();
    for file in &args.files {
        let content = read(file)?;
        evidence.read(&file.display().to_string(), &content).map_err(|e| {
            let way_out = "give reports that are whole, or leave it out";
            Failure::new(Exit::Corrupt, e.file, e.problem, way_out)
        })?;
    }
    let mut written = Vec::new();
    if let Some(dir) = &args.csv {
        fs::create_dir_all(dir).map_err(|e| Failure::file("make the directory", dir, &e))?;
        for file in evidence.csv()? {
            let path = dir.join(file.name);
            put(&path, &file.content)?;
            written.push(path);
        }
    }
    let page = evidence.html();
    put(&args.out, page.as_bytes())?;
    written.push(args.out.clone());
    let said =
        serde_json::json!({ "runs": evidence.runs(), "bytes": page.len(), "written": written });
    output.done(&said, |_| {
        let (out, size) = (args.out.display(), bytes(page.len() as u64));
        let tables = args.csv.as_ref().map(|dir| format!(", tables in {}", dir.display()));
        let runs = if evidence.runs() == 1 { "run" } else { "runs" };
        format!("{out}: {} {runs}, {size}{}", evidence.runs(), tables.unwrap_or_default())
    });
    Ok(())
}

/// A file's content; of one that is too long, enough to tell.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut content = Vec::new();
    let most = MAX_FILE_BYTES as u64 + 1;
    let read = File::open(path).and_then(|file| file.take(most).read_to_end(&mut content));
    read.map_err(|e| Failure::file("read", path, &e))?;
    Ok(content)
}

/// Writes a file beside and gives it its name when it is whole: who has the page open sees the old
/// one or the new one.
fn put(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let put = || {
        let mut file = tempfile::Builder::new().permissions(readable()).tempfile_in(dir)?;
        file.write_all(content)?;
        file.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    put().map_err(|e: std::io::Error| Failure::file("write", path, &e))
}

/// Of a report nothing is secret; the umask has the last word.
fn readable() -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o666)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(dir: &Path, content: &str) -> ReportArgs {
        let file = dir.join("report.json");
        fs::write(&file, content).unwrap();
        ReportArgs { files: vec![file], out: dir.join("page.html"), csv: Some(dir.join("csv")) }
    }

    #[test]
    fn a_page_and_tables_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let report = handoff::report::Report { handoff: "1".into(), ..Default::default() };
        let args = args(dir.path(), &serde_json::to_string(&report).unwrap());
        run(&args, Output::new(true)).unwrap();
        assert!(fs::read_to_string(&args.out).unwrap().starts_with("<!DOCTYPE html>"));
        let tables = fs::read_dir(dir.path().join("csv")).unwrap().count();
        assert_eq!(tables, 4);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn what_cannot_be_read_is_named_and_nothing_written() {
        let dir = tempfile::tempdir().unwrap();
        let args = args(dir.path(), "{\"handoff\": \"1\", ");
        let error = run(&args, Output::new(true)).unwrap_err();
        let failure = crate::failure::describe(&error);
        assert_eq!(failure.exit, Exit::Corrupt);
        assert!(failure.message.contains("report.json: it is cut off"), "{failure}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
