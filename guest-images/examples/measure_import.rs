//! Measures what a large base costs: `measure_import DIR [GIB]` makes images of GIB gibibytes (8)
//! in DIR, one of random data and one mostly of holes, imports, looks up and verifies them. DIR
//! needs three times the room; what is made there stays for the next run. A run that is killed
//! shows in the next one what going on saves.

use std::{
    error::Error,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use guest_images::{Base, ChunkHash, ImportSpec, MemorySpec, Part, Place, Store};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let dir = PathBuf::from(args.next().ok_or("usage: measure_import DIR [GIB]")?);
    let gib = args.next().map_or(Ok(8), |gib| gib.to_string_lossy().parse())?;
    fs::create_dir_all(&dir)?;
    let random = random_image(&dir, gib)?;
    let sparse = sparse_image(&dir, gib)?;
    let small = dir.join("small.img");
    fs::write(&small, [1; 4096])?;
    // The head of an ELF file for x86-64 is all that an import looks at.
    let mut head = [0; 5000];
    head[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    head[16..20].copy_from_slice(&[2, 0, 62, 0]);
    let kernel = dir.join("kernel");
    if !kernel.exists() {
        fs::write(&kernel, head)?;
    }
    let store = Store::open(&dir.join("store"))?;
    let spec = |disk: &Path, memory| ImportSpec {
        name: "measure".into(),
        disk: disk.to_owned(),
        kernel: kernel.clone(),
        initramfs: None,
        cmdline: String::new(),
        memory,
    };
    let memory = Some(MemorySpec { ram: sparse, machine: vec![1] });
    measure(&store, &format!("{gib} GiB of memory, mostly holes"), &spec(&small, memory))?;
    measure(&store, &format!("{gib} GiB of random disk"), &spec(&random, None))
}

fn random_image(dir: &Path, gib: u64) -> Result<PathBuf, Box<dyn Error>> {
    let path = dir.join(format!("random-{gib}.img"));
    if !path.exists() {
        let mut file = File::create(&path)?;
        let mut piece = vec![0; MIB as usize];
        let mut stream = blake3::Hasher::new().finalize_xof();
        for _ in 0..gib * GIB / MIB {
            stream.fill(&mut piece);
            file.write_all(&piece)?;
        }
        file.sync_all()?;
    }
    Ok(path)
}

/// 64 KiB of data in every 8 MiB.
fn sparse_image(dir: &Path, gib: u64) -> Result<PathBuf, Box<dyn Error>> {
    let path = dir.join(format!("sparse-{gib}.img"));
    if !path.exists() {
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        file.set_len(gib * GIB)?;
        let mut piece = vec![0; 64 << 10];
        let mut stream = blake3::Hasher::new().update(b"sparse").finalize_xof();
        for n in 0..gib * GIB / (8 * MIB) {
            stream.fill(&mut piece);
            file.write_all_at(&piece, n * 8 * MIB)?;
        }
        file.sync_all()?;
    }
    Ok(path)
}

fn measure(store: &Store, what: &str, spec: &ImportSpec) -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout();
    let (cpu, started) = (cpu_time(), Instant::now());
    let id = store.import(spec, &mut |_| {})?;
    let (cpu, time) = (cpu_time() - cpu, started.elapsed());
    writeln!(out, "{what}: import {:.2} s, {cpu:.2} s of CPU", time.as_secs_f64())?;
    let started = Instant::now();
    let base = store.get_id(&id)?;
    let ms = started.elapsed().as_secs_f64() * 1e3;
    writeln!(out, "{what}: open {ms:.2} ms, {} chunks in the index", base.index().len())?;
    measure_lookups(&base, &mut out)?;
    measure_reads(&base, &mut out)?;
    drop(base);
    let started = Instant::now();
    let problems = store.verify(&id, &mut |_| {})?.len();
    let time = started.elapsed().as_secs_f64();
    writeln!(out, "{what}: verify {time:.2} s, {problems} problems")?;
    store.remove(&id)?;
    Ok(())
}

/// Look-ups of which half are found, in random order.
fn measure_lookups(base: &Base, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
    let chunks = base.disk_chunks();
    let hashes: Vec<ChunkHash> = (0..1u64 << 16)
        .map(|n| match n % 2 {
            0 => {
                let index = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % chunks;
                let chunk = base.chunk(Place { part: Part::Disk, index });
                chunk.map_or(ChunkHash([0; 32]), ChunkHash::of)
            }
            _ => ChunkHash(*blake3::hash(&n.to_le_bytes()).as_bytes()),
        })
        .collect();
    let mut places = vec![None; hashes.len()];
    for round in ["first", "second"] {
        let started = Instant::now();
        base.lookup_batch(&hashes, &mut places);
        let batch = started.elapsed();
        let started = Instant::now();
        let found = hashes.iter().filter(|hash| base.lookup(hash).is_some()).count();
        let singly = started.elapsed();
        let each = |time: Duration| time.as_nanos() as usize / hashes.len();
        let (batch, singly) = (each(batch), each(singly));
        writeln!(
            out,
            "  {round} round: {batch} ns a look-up in a batch, {singly} ns singly, {found} found"
        )?;
    }
    Ok(())
}

/// What it costs to find that chunks equal those of the base: with these mapped, and read.
fn measure_reads(base: &Base, out: &mut impl Write) -> Result<(), Box<dyn Error>> {
    let chunks = base.disk_chunks().min(GIB / 4096);
    let (mut mapped, mut read, mut equal) = (Duration::ZERO, Duration::ZERO, 0);
    let mut theirs = [0; 4096];
    for first in (0..chunks).step_by(64) {
        let range = first..chunks.min(first + 64);
        let place = |index| Place { part: Part::Disk, index };
        let own: Vec<_> = range.clone().filter_map(|n| base.chunk(place(n)).copied()).collect();
        let started = Instant::now();
        for (index, own) in range.clone().zip(&own) {
            equal += u64::from(base.chunk(place(index)) == Some(own));
        }
        mapped += started.elapsed();
        let started = Instant::now();
        for (index, own) in range.zip(&own) {
            base.disk_file().read_exact_at(&mut theirs, index * 4096)?;
            equal += u64::from(theirs == *own);
        }
        read += started.elapsed();
    }
    let each = |time: Duration| time.as_nanos() as u64 / chunks;
    let (mapped, read) = (each(mapped), each(read));
    writeln!(out, "  {mapped} ns to compare a mapped chunk, {read} ns to read and compare one")?;
    assert_eq!(equal, 2 * chunks);
    Ok(())
}

/// CPU seconds of this process so far.
fn cpu_time() -> f64 {
    let mut stat = String::new();
    let _ = File::open("/proc/self/stat").and_then(|mut file| file.read_to_string(&mut stat));
    // User and system time are the 14th and 15th fields, in hundredths of a second; the second
    // field may hold spaces and ends with the last parenthesis.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace();
    fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / 100.0
}
