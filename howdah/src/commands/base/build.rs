//! `howdah base build`: runs a recipe, and, for a base with memory, its guest.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use guest_images::{
    Base,
    store::{ImportSpec, MemorySpec, Store},
};

use super::{Staging, import, store, store_failure, with_bar};
use crate::{
    cli::{BaseBuildArgs, BootArgs},
    failure::{Exit, Failure},
    home::{Home, VmConfig},
    mac::Mac,
    offer::check_append,
    output::Output,
    vmproc::{self, snapshot},
};

/// Guest memory unless said otherwise.
const DEFAULT_MEMORY_MIB: u64 = 512;
/// No command line of a recipe is longer: the kernel's own limit is below it.
const MAX_CMDLINE_BYTES: u64 = 4096;

/// Runs `howdah base build`.
pub(super) fn run(args: BaseBuildArgs, home: &Home, output: Output) -> anyhow::Result<()> {
    if let Some(append) = &args.boots.append {
        check_append(append)
            .map_err(|e| Failure::new(Exit::Usage, "--append", e, "shorten or correct it"))?;
    }
    let with_memory = args.boot || args.from.is_some();
    if with_memory {
        // Before a recipe takes its minutes.
        vmproc::check_host()?;
    }
    if let Some(from) = &args.from {
        let base = store(home)?.get(from).map_err(store_failure)?;
        if base.memory_file().is_some() {
            let why = "it has memory already";
            let way_out = "name the base without memory that it was built from";
            return Err(Failure::new(Exit::Usage, format!("--from {from}"), why, way_out).into());
        }
        // Required beside --from.
        let name = args.name.unwrap_or_default();
        let staging = Staging::new(home)?;
        return boot(base, name, &args.boots, &staging, home, output);
    }
    let recipe = find_recipe(&args)?;
    let name = name_of(&args, &recipe)?;
    let staging = Staging::new(home)?;
    let spec = build(name.clone(), &recipe, &staging, output)?;
    if !with_memory {
        return import(&spec, home, output);
    }
    // In a store of its own, which goes when this is done: nobody else wants the base without memory.
    let private = Store::open(&staging.0.join("store")).map_err(store_failure)?;
    let id = with_bar(output, "preparing", |progress| {
        private.import(&spec, progress).map_err(store_failure)
    })?;
    let base = private.get_id(&id).map_err(store_failure)?;
    boot(base, name, &args.boots, &staging, home, output)
}

fn name_of(args: &BaseBuildArgs, recipe: &Path) -> Result<String, Failure> {
    let last = || recipe.file_name()?.to_str().map(str::to_owned);
    args.name.clone().or_else(last).ok_or_else(|| {
        let what = format!("recipe {}", recipe.display());
        Failure::new(Exit::Usage, what, "it has no name", "give one with --name")
    })
}

/// Runs the recipe; what it left in `staging`.
fn build(
    name: String,
    recipe: &Path,
    staging: &Staging,
    output: Output,
) -> Result<ImportSpec, Failure> {
    let script = recipe.join("build");
    output.note(&format!("building base {name} with {}", script.display()));
    // The script's words go to stderr: stdout is for the result.
    let status = Command::new(&script)
        .arg(&staging.0)
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .map_err(|e| Failure::file("run", &script, &e))?;
    if !status.success() {
        let what = format!("recipe {}", script.display());
        return Err(Failure::new(Exit::Failed, what, status, "its messages above say why"));
    }
    let part = |file: &str| staging.0.join(file);
    let initramfs = Some(part("initramfs")).filter(|path| path.exists());
    let cmdline = read_cmdline(&part("cmdline"))?;
    let (disk, kernel) = (part("disk.raw"), part("kernel"));
    Ok(ImportSpec { name, disk, kernel, initramfs, cmdline, memory: None })
}

/// Boots a guest of `base` and makes a base with memory of it.
fn boot(
    base: Base,
    name: String,
    args: &BootArgs,
    staging: &Staging,
    home: &Home,
    output: Output,
) -> anyhow::Result<()> {
    let (kernel, initramfs) = (base.kernel_path(), base.initramfs_path());
    let append = args.append.clone().unwrap_or_default();
    let cmdline = vmproc::cmdline(&base, &append);
    let mac = args.mac.unwrap_or_else(|| Mac::of(&name));
    let config = VmConfig {
        memory_mib: args.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
        vcpus: args.vcpus.unwrap_or(1),
        mac: args.tap.as_ref().map(|_| mac.to_string()),
        tap: args.tap.clone(),
        append,
        cpu: args.cpu,
        ..VmConfig::of(&base.id())
    };
    output.note(&format!("booting a guest for base {name}, until it says {:?}", args.ready));
    vmproc::warn_of_slow_host(output);
    let wanted = snapshot::Wanted {
        ready: args.ready.clone(),
        timeout: Duration::from_secs(args.timeout_s),
        settle: Duration::from_secs(args.settle_s),
        console_log: home.root().join("base-build.console.log"),
    };
    let taken = snapshot::take(&config, Arc::new(base), &staging.0, &wanted, &args.jail)?;
    let memory = Some(MemorySpec { ram: taken.ram, machine: taken.machine });
    let spec = ImportSpec { name, disk: taken.disk, kernel, initramfs, cmdline, memory };
    import(&spec, home, output)
}

/// A recipe is a directory with an executable `build`: at a path, or by its name in a directory of
/// recipes (said, or that of the source tree this runs in).
fn find_recipe(args: &BaseBuildArgs) -> Result<PathBuf, Failure> {
    let recipe = args.recipe.clone().unwrap_or_default();
    let mut places = vec![PathBuf::from(&recipe)];
    match &args.recipes {
        Some(dir) => places.push(dir.join(&recipe)),
        None => {
            let below = Path::new("guest-images/recipes").join(&recipe);
            let from = [std::env::current_dir().ok(), std::env::current_exe().ok()];
            let above = from.iter().flatten().flat_map(|path| path.ancestors());
            places.extend(above.map(|dir| dir.join(&below)));
        }
    }
    let found = places.iter().find(|dir| dir.join("build").is_file());
    let found = found.map(|dir| fs::canonicalize(dir).unwrap_or_else(|_| dir.clone()));
    found.ok_or_else(|| {
        Failure::new(
            Exit::NotFound,
            format!("recipe {recipe}"),
            "no directory of that name holds a `build` script",
            "give its path, or the directory of recipes with --recipes",
        )
    })
}

fn read_cmdline(path: &Path) -> Result<String, Failure> {
    use std::io::Read;
    let failed = |e: std::io::Error| Failure::file("read", path, &e);
    let mut text = String::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MAX_CMDLINE_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok(text.trim().to_owned())
}
