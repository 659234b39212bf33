//! Every target over its seeds, and for a moment over random mutations of them.
//!
//! `HOWDAH_SMOKE_MS` is how long each target is tried (500), `HOWDAH_SMOKE_SEED` where chance begins,
//! `HOWDAH_SMOKE_TARGETS` which targets (all).
//! What a target does not survive is left in a file, and the seed is printed: `fuzz/README.md`.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::{
    env, fs, panic,
    path::{Path, PathBuf},
    process,
    sync::Mutex,
    time::{Duration, Instant},
};

use howdah_fuzz::{TARGETS, Target, mutate::mutate, targets};
use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// What is tried at present, by target: for the message when it fails.
static TRIED: Mutex<Vec<(&str, Vec<u8>)>> = Mutex::new(Vec::new());

/// A target fails where any thread panics, also one that the product has started and would survive.
fn fail_on_panic_in_any_thread() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        usual(info);
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        for (name, input) in TRIED.lock().unwrap().iter() {
            let path = dir.join(format!("{name}-{}", blake3::hash(input).to_hex().split_at(16).0));
            let written = fs::write(&path, input);
            eprintln!("target {name} did not survive {} ({written:?})", path.display());
        }
        process::abort();
    }));
}

fn committed(target: &Target) -> Vec<Vec<u8>> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target.name);
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn try_one(target: &Target, input: &[u8]) -> bool {
    let key = |(name, _): &(&str, Vec<u8>)| *name == target.name;
    {
        let mut tried = TRIED.lock().unwrap();
        tried.retain(|entry| !key(entry));
        tried.push((target.name, input.to_vec()));
    }
    let taken = (target.run)(input);
    TRIED.lock().unwrap().retain(|entry| !key(entry));
    taken
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap())
}

fn smoke(target: &Target, patience: Duration, seed: u64) {
    let mut seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "{} has seeds", target.name);
    seeds.extend(committed(target));
    for (number, seed) in seeds.iter().enumerate() {
        assert!(seed.len() <= target.max_len, "a seed of {} is too long", target.name);
        let taken = try_one(target, seed);
        assert!(taken || number > 0, "the first seed of {} is sound", target.name);
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    let (begun, mut runs, mut taken) = (Instant::now(), 0, 0);
    while begun.elapsed() < patience {
        let [one, other] = [(); 2].map(|()| &seeds[rng.random_range(0..seeds.len())]);
        let mut input = one.clone();
        mutate(&mut rng, &mut input, other, target.max_len);
        taken += u32::from(try_one(target, &input));
        runs += 1;
    }
    println!("{}: {} seeds, {runs} mutations, {taken} taken", target.name, seeds.len());
}

#[test]
fn every_target_survives_its_seeds_and_mutations_of_them() {
    fail_on_panic_in_any_thread();
    let patience = Duration::from_millis(number("HOWDAH_SMOKE_MS").unwrap_or(500));
    let seed = number("HOWDAH_SMOKE_SEED").unwrap_or_else(rand::random);
    println!("seed {seed}");
    let only = env::var("HOWDAH_SMOKE_TARGETS").unwrap_or_default();
    let only: Vec<&str> = only.split_whitespace().collect();
    for target in TARGETS.iter().filter(|target| only.is_empty() || only.contains(&target.name)) {
        smoke(target, patience, seed);
    }
}

#[test]
fn every_target_has_a_program_and_no_seeds_are_left_behind() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for target in TARGETS {
        let program = root.join("fuzz_targets").join(format!("{}.rs", target.name));
        assert!(program.exists(), "{} is missing", program.display());
    }
    for kind in ["seeds", "fuzz_targets"] {
        for entry in fs::read_dir(root.join(kind)).into_iter().flatten() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy();
            assert!(targets::find(&name).is_some(), "{} is of no target", path.display());
        }
    }
}
