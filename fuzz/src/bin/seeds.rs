//! Writes the seeds of a target into a directory, for libFuzzer to begin with; or lists the targets.
//!
//! ```text
//! seeds                 one line for each target: its name and the longest input to try
//! seeds TARGET DIR
//! ```
#![allow(clippy::print_stdout)]

use std::{env, error::Error, fs, path::Path};

use howdah_fuzz::targets;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {
            for target in targets::TARGETS {
                println!("{} {}", target.name, target.max_len);
            }
            Ok(())
        }
        [name, dir] => write(name, Path::new(dir)),
        _ => Err("usage: seeds [TARGET DIR]".into()),
    }
}

fn write(name: &str, dir: &Path) -> Result<(), Box<dyn Error>> {
    let target = targets::find(name).ok_or_else(|| format!("there is no target {name}"))?;
    fs::create_dir_all(dir)?;
    for (number, seed) in (target.seeds)().iter().enumerate() {
        fs::write(dir.join(format!("made-{number:02}")), seed)?;
    }
    Ok(())
}
