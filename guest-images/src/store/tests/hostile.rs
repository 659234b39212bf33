//! Files of a base with memory that someone else made: whatever is in them, a base opens or is
//! refused with the file's name, and what it gives is inside it.

use super::*;
use crate::{
    index::{Index, PartRoots},
    manifest::Manifest,
};

fn with_memory() -> (Fixture, BaseId) {
    let seeds: Vec<u8> = (0..60).collect();
    let fixture = Fixture::new(&disk(&[1, 0, 2])).with_memory(&seeds);
    let id = fixture.import();
    (fixture, id)
}

/// Every place that the index may name, and every chunk of every part.
fn use_all(base: &Base) {
    let mut hashes: Vec<_> = base.index().entries().map(|entry| *entry.hash()).collect();
    hashes.push(ChunkHash([0; 32]));
    hashes.push(ChunkHash([0xff; 32]));
    let mut places = vec![None; hashes.len()];
    base.lookup_batch(&hashes, &mut places);
    for (hash, place) in hashes.iter().zip(places) {
        assert_eq!(base.lookup(hash), place);
        assert!(place.is_none_or(|place| base.chunk(place).is_some()));
    }
    for part in Part::ALL {
        let chunks = base.part_chunks(part);
        for index in (0..chunks).chain([chunks, u64::MAX >> 12, u64::MAX]) {
            assert_eq!(base.chunk(Place { part, index }).is_some(), index < chunks);
        }
    }
    let _ = base.machine();
}

#[test]
fn a_memory_or_machine_of_the_wrong_length_is_refused_by_name() {
    for (file, bytes) in
        [("memory.raw", 59 * 4096), ("memory.raw", 0), ("machine", 8), ("machine", 0)]
    {
        let (fixture, id) = with_memory();
        fixture.damage(&id, file, 0, &[]);
        let path = fixture.store.base_dir(&id).join(file);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes).unwrap();
        let error = fixture.store.get_id(&id).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(&format!("has {bytes} bytes")), "{error}");
        fs::remove_file(&path).unwrap();
        let error = fixture.store.get_id(&id).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains("No such file"), "{error}");
        assert_eq!(fixture.import(), id, "importing again mends it");
        assert!(fixture.problems(&id).is_empty());
    }
}

#[test]
fn an_index_without_memory_is_not_taken_for_one_with() {
    let (fixture, id) = with_memory();
    let mut plain = fixture.spec.clone();
    plain.memory = None;
    let plain = fixture.store.import(&plain, &mut |_| {}).unwrap();
    let index = |id| fixture.store.base_dir(id).join(INDEX_FILE);
    let other = fs::read(index(&plain)).unwrap();
    fs::remove_file(index(&id)).unwrap();
    fs::write(index(&id), other).unwrap();
    let error = fixture.store.get_id(&id).unwrap_err().to_string();
    assert!(error.contains("index version 1") && error.contains("needs version 2"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Noise anywhere in the index, its header included, and any length.
    #[test]
    fn any_index(
        at in prop_oneof![0u64..240, 0u64..3000],
        noise in proptest::collection::vec(any::<u8>(), 1..80),
        cut in proptest::option::of(0u64..3000),
    ) {
        let (fixture, id) = with_memory();
        fixture.damage(&id, INDEX_FILE, at, &noise);
        if let Some(bytes) = cut {
            let path = fixture.store.base_dir(&id).join(INDEX_FILE);
            OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
        }
        match fixture.store.get_id(&id) {
            Ok(base) => use_all(&base),
            Err(error) => prop_assert!(error.to_string().contains(INDEX_FILE)),
        }
    }

    /// An index of any entries under a sound header: only the checksums of an attacker are right.
    #[test]
    fn any_entries(entries in proptest::collection::vec(any::<[u8; 20]>(), 0..60)) {
        let (fixture, id) = with_memory();
        let roots = PartRoots::of(fixture.store.get_id(&id).unwrap().manifest());
        let run: Vec<[u8; 40]> = entries
            .iter()
            .map(|bytes| std::array::from_fn(|i| bytes[i / 2]))
            .collect();
        let path = fixture.store.base_dir(&id).join(INDEX_FILE);
        fs::remove_file(&path).unwrap();
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        crate::index::build::write(&file, &roots, &[&run]).unwrap();
        prop_assert!(Index::open(&path, &roots).is_ok());
        use_all(&fixture.store.get_id(&id).unwrap());
        prop_assert!(!fixture.problems(&id).is_empty());
    }

    /// A manifest with any bytes in it is the base's own, another base's, or refused.
    #[test]
    fn any_manifest(at in 0usize..900, noise in proptest::collection::vec(any::<u8>(), 1..8)) {
        let (fixture, id) = with_memory();
        let path = fixture.store.base_dir(&id).join(MANIFEST_FILE);
        let mut json = fs::read(&path).unwrap();
        let at = at % json.len();
        let end = (at + noise.len()).min(json.len());
        json[at..end].copy_from_slice(&noise[..end - at]);
        fs::remove_file(&path).unwrap();
        fs::write(&path, &json).unwrap();
        match fixture.store.get_id(&id) {
            Ok(base) => prop_assert_eq!(base.id(), id),
            Err(StoreError::Base(BaseError::WrongId { found, .. })) => prop_assert!(found != id),
            Err(error) => prop_assert!(error.to_string().contains(MANIFEST_FILE), "{}", error),
        }
    }

    /// Numbers of any size in a manifest make no other one with the same id, and no panic.
    #[test]
    fn any_sizes(ram in any::<u64>(), machine in any::<u64>(), version in 0u32..4) {
        let (fixture, id) = with_memory();
        let sound = fixture.store.get_id(&id).unwrap().manifest().clone();
        let mut other = sound.clone();
        other.version = version;
        let memory = other.memory.as_mut().unwrap();
        (memory.ram.bytes, memory.machine.bytes) = (ram, machine);
        let parsed = Manifest::parse(&other.to_json().unwrap());
        let possible = version == 2
            && (1..=16 << 20).contains(&machine)
            && ram % 4096 == 0
            && (1..=4 << 40).contains(&ram);
        prop_assert_eq!(parsed.is_ok(), possible);
        prop_assert_eq!(other.id() == id, other == sound);
    }
}
