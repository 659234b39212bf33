//! `howdah base`, on bases small enough to make up.

use std::fs;

use crate::common::{Cloudlet, disk, executable, kernel};

#[test]
fn a_base_is_imported_listed_verified_and_removed() {
    let cloudlet = Cloudlet::new();
    let said = cloudlet.line("base ls").ok().stdout;
    assert!(said.contains("howdah base import"), "{said}");
    let said = cloudlet.base("tiny").ok().stdout;
    let listed = cloudlet.line("base ls --json").ok().json();
    let id = listed[0]["id"].as_str().unwrap().to_owned();
    assert!(said.contains(&id), "{said}");
    assert_eq!(listed[0]["names"][0], "tiny");
    assert_eq!(listed[0]["disk_bytes"], 3 * 4096);
    cloudlet.line("base verify tiny").ok();
    // The same files make the same base: bases are named by their content.
    cloudlet.run(&["base", "import", "twin", "--disk", "disk.raw", "--kernel", "kernel"]).ok();
    assert_eq!(cloudlet.line("--json base ls").json().as_array().unwrap().len(), 1);
    cloudlet.run(&["base", "rm", &id[..16]]).ok();
    cloudlet.line("base verify tiny").fails(3, &["tiny"]);
}

#[test]
fn a_base_with_memory_goes_to_another_cloudlet() {
    let cloudlet = Cloudlet::new();
    cloudlet.base_with_memory("warm", None).ok();
    let listed = cloudlet.line("base ls --json").ok().json();
    assert_eq!(listed[0]["memory_bytes"], 32 << 20);
    cloudlet.line("base verify warm").ok();
    let id = listed[0]["id"].as_str().unwrap();
    let dir = cloudlet.home().join("store/bases").join(id);
    let other = Cloudlet::new();
    let from = |dir: &str| other.run(&["base", "import", "w", "--from", dir]);
    let imported = from(dir.to_str().unwrap()).ok();
    assert!(imported.stdout.contains(id), "{imported:?}");
    from("nowhere").fails(3, &["nowhere", "manifest.json"]);
    other.file("odd/manifest.json", b"{}");
    from("odd").fails(6, &["odd", "manifest.json"]);
    other.line("base import x --from odd --disk d").fails(2, &["--from", "--disk"]);
}

#[test]
fn damage_is_found_and_named() {
    let cloudlet = Cloudlet::new();
    cloudlet.base("tiny").ok();
    let id = cloudlet.line("base ls --json").json()[0]["id"].as_str().unwrap().to_owned();
    let disk = cloudlet.home().join("store/bases").join(&id).join("disk.raw");
    let mut content = fs::read(&disk).unwrap();
    content[5000] ^= 1;
    fs::remove_file(&disk).unwrap();
    fs::write(&disk, &content).unwrap();
    cloudlet.line("base verify tiny").fails(6, &["tiny", "disk.raw", "chunk 1"]);
    fs::write(&disk, &content[..4096]).unwrap();
    cloudlet.line("base verify tiny").fails(6, &["disk.raw", "4096"]);
    cloudlet.line("vm run a --base tiny").fails(6, &["disk.raw", "import it again"]);
}

#[test]
fn foreign_and_missing_files_are_refused() {
    let cloudlet = Cloudlet::new();
    cloudlet.file("disk.raw", &disk());
    cloudlet.file("kernel", &kernel());
    cloudlet.file("text", b"not a kernel at all");
    cloudlet.file("odd", &[7; 1000]);
    cloudlet.file("disk.qcow2", b"QFI\xfb and the rest");
    let import = |disk: &str, kernel: &str| {
        cloudlet.run(&["base", "import", "x", "--disk", disk, "--kernel", kernel])
    };
    import("disk.raw", "missing").fails(3, &["missing"]);
    import("missing", "kernel").fails(3, &["missing"]);
    import("disk.raw", "text").fails(6, &["text", "bzImage"]);
    import("disk.qcow2", "kernel").fails(6, &["disk.qcow2", "qemu-img convert"]);
    import("odd", "kernel").fails(6, &["odd"]);
    import("/", "kernel").fails(2, &["/"]);
    assert!(cloudlet.line("base ls --json").json().as_array().unwrap().is_empty());
}

#[test]
fn a_recipe_is_built_and_imported() {
    let cloudlet = Cloudlet::new();
    let script = "#!/bin/sh\nset -e\necho building\ncp disk.raw kernel \"$1\"\necho 'console=ttyS0 x=1' > \"$1/cmdline\"\n";
    executable(&cloudlet.file("recipes/tiny/build", script.as_bytes()));
    executable(&cloudlet.file("recipes/broken/build", b"#!/bin/sh\necho no luck >&2\nexit 3\n"));
    cloudlet.file("disk.raw", &disk());
    cloudlet.file("kernel", &kernel());
    let built = cloudlet.line("base build tiny --recipes recipes --json").ok();
    assert_eq!(built.json()["name"], "tiny");
    assert!(built.stderr.contains("building"), "{built:?}");
    cloudlet.line("base build ./recipes/tiny --name other").ok();
    let names = cloudlet.line("base ls --json").json()[0]["names"].to_string();
    assert_eq!(names, "[\"other\",\"tiny\"]");
    let broken = cloudlet.line("base build broken --recipes recipes");
    assert_eq!(broken.code, Some(1));
    assert!(broken.stderr.contains("no luck"), "{broken:?}");
    cloudlet.line("base build nowhere --recipes recipes").fails(3, &["nowhere", "--recipes"]);
    let left: Vec<_> =
        fs::read_dir(cloudlet.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["store"]);
}
