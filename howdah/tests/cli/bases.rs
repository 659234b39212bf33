//! `howdah base`, on bases small enough to make up.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
};

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

/// A program that a test makes its images with. It says so where there is none.
fn tool(program: &str, args: &[&str], dir: &Path) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default());
    let ran = Command::new(program).args(args).current_dir(dir).env("PATH", path).output();
    let ran = ran.ok().filter(|ran| ran.status.success());
    if ran.is_none() {
        eprintln!(
            "skipped: {program} {args:?} does not work here; `make setup` installs what brings it"
        );
    }
    ran.is_some()
}

const ROOT_UUID: &str = "5f3a8b1c-0d2e-4f60-8a7b-9c0d1e2f3a4b";

/// A disk as cloud images have it: a GPT, the root as partition 1 behind others, GRUB's configuration in /boot.
fn cloud_image(cloudlet: &Cloudlet, name: &str) -> bool {
    let grub = format!(
        "set default=0\nmenuentry 'Debian GNU/Linux' --class debian {{\n\tinsmod part_gpt\n\tlinux\t/boot/vmlinuz-6.12.0 \
         root=PARTUUID={ROOT_UUID} ro console=tty0 console=ttyS0,115200\n\tinitrd\t/boot/initrd.img-6.12.0\n}}\n"
    );
    cloudlet.file("tree/boot/grub/grub.cfg", grub.as_bytes());
    cloudlet.file("tree/boot/vmlinuz-6.12.0", &kernel());
    cloudlet.file("tree/boot/initrd.img-6.12.0", b"an initrd");
    cloudlet.file("tree/etc/fstab", b"");
    let dir = cloudlet.path("");
    if !tool("mke2fs", &["-q", "-t", "ext4", "-d", "tree", "root.ext4", "6M"], &dir) {
        return false;
    }
    let image = File::create(cloudlet.path(name)).unwrap();
    image.set_len(12 << 20).unwrap();
    let table = format!(
        "label: gpt\n14: start=2048, size=2048, type=21686148-6449-6E6F-744E-656564454649\n\
         1: start=8192, size=12288, uuid={ROOT_UUID}\n"
    );
    cloudlet.file("table", table.as_bytes());
    let script = format!("sfdisk -q {name} < table");
    if !tool("sh", &["-c", &script], &dir) {
        return false;
    }
    let root = fs::read(cloudlet.path("root.ext4")).unwrap();
    image.write_all_at(&root, 8192 * 512).unwrap();
    true
}

#[test]
fn a_cloud_image_is_imported_with_the_kernel_it_boots() {
    let cloudlet = Cloudlet::new();
    if !cloud_image(&cloudlet, "cloud.raw") {
        return;
    }
    let ran = cloudlet.line("base import cloud --disk cloud.raw").ok();
    assert!(ran.stderr.contains("/boot/grub/grub.cfg of partition 1"), "{ran:?}");
    let id = cloudlet.line("base ls --json").json()[0]["id"].as_str().unwrap().to_owned();
    let dir = cloudlet.home().join("store/bases").join(&id);
    assert_eq!(fs::read(dir.join("kernel")).unwrap(), kernel());
    assert_eq!(fs::read(dir.join("initramfs")).unwrap(), b"an initrd");
    assert!(
        fs::read(dir.join("disk.raw")).unwrap() == fs::read(cloudlet.path("cloud.raw")).unwrap()
    );
    let manifest = fs::read_to_string(dir.join("manifest.json")).unwrap();
    let cmdline = format!("root=PARTUUID={ROOT_UUID} ro console=tty0 console=ttyS0,115200");
    assert!(manifest.contains(&cmdline), "{manifest}");
    let left: Vec<_> =
        fs::read_dir(cloudlet.home()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["store"]);

    // The same disk in qcow2 is the same base, however it is packed.
    let dir = cloudlet.path("");
    for options in [
        &["-O", "qcow2"][..],
        &["-c", "-O", "qcow2"],
        &["-c", "-O", "qcow2", "-o", "compression_type=zstd"],
    ] {
        let args = [&["convert", "-f", "raw"], options, &["cloud.raw", "cloud.qcow2"]].concat();
        if !tool("qemu-img", &args, &dir) {
            return;
        }
        cloudlet.line("base import again --disk cloud.qcow2").ok();
        let listed = cloudlet.line("base ls --json").json();
        assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
        assert_eq!(listed[0]["id"], id.as_str());
    }
    cloudlet
        .run(&["base", "import", "own", "--disk", "cloud.qcow2", "--cmdline", "root=/dev/vda1"])
        .ok();
    assert_eq!(cloudlet.line("base ls --json").json().as_array().unwrap().len(), 2);
    // What is only a difference is refused, and so is half a file.
    let over = ["create", "-q", "-f", "qcow2", "-b", "cloud.raw", "-F", "raw", "over.qcow2"];
    if tool("qemu-img", &over, &dir) {
        let why = ["over.qcow2", "cloud.raw", "qemu-img convert"];
        cloudlet.line("base import x --disk over.qcow2").fails(6, &why);
    }
    let whole = fs::read(cloudlet.path("cloud.qcow2")).unwrap();
    cloudlet.file("half.qcow2", &whole[..whole.len() / 4]);
    cloudlet.line("base import x --disk half.qcow2").fails(6, &["half.qcow2"]);
}

#[test]
fn without_a_kernel_one_must_be_in_the_image() {
    let cloudlet = Cloudlet::new();
    cloudlet.file("disk.raw", &disk());
    let import = |words: &str| cloudlet.line(&format!("base import x {words}"));
    import("--disk disk.raw").fails(6, &["disk.raw", "no kernel", "--kernel"]);
    import("--disk missing").fails(3, &["missing"]);
    import("--disk /").fails(2, &["directory"]);
    import("--disk /dev/null").fails(2, &["/dev/null"]);
    import("--disk disk.raw --initramfs disk.raw").fails(2, &["--kernel"]);
}
