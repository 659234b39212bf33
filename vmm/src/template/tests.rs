use kvm_bindings::kvm_cpuid_entry2 as Entry;

use super::*;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Entry {
    Entry { function, index, eax, ebx, ecx, edx, ..Entry::default() }
}

/// A host that has everything that has a bit.
fn everything() -> Vec<Entry> {
    let all = u32::MAX;
    let mut table = vec![
        entry(0, 0, [0x20, 1, 2, 3]),
        entry(1, 0, [0xf_0000, 0, all, all]),
        entry(7, 0, [2, all, all, all]),
        entry(7, 1, [all, 0, 0, all]),
        entry(0xb, 0, [0, 1, 0x100, 0]),
        entry(0xd, 0, [0x600e7, 11000, 11000, 0]),
        entry(0xd, 1, [0x1f, 11000, 0x1800, 0]),
        entry(0xd, 2, [256, 576, 0, 0]),
        entry(0xd, 5, [64, 1088, 0, 0]),
        entry(0x14, 0, [1, 1, 1, 1]),
        entry(0x8000_0000, 0, [0x8000_0028, 0, 0, 0]),
        entry(0x8000_0021, 0, [all, 0, 0, 0]),
    ];
    table.push(entry(KVM_FEATURES, 0, [all, 0, 0, 0]));
    table.push(entry(AMD_FEATURES, 0, [0, 0, all, all]));
    table.push(entry(AMD_SIZES, 0, [0x0030_3034, all, 0, 0]));
    table
}

fn cut(template: CpuTemplate) -> Vec<Entry> {
    let mut table = everything();
    template.apply(&mut table).unwrap();
    table
}

fn of(table: &[Entry], leaf: u32, register: Register) -> u32 {
    cpuid::find(table, leaf, 0).map_or(0, |entry| register.of(entry))
}

#[test]
fn a_template_shows_its_level_and_nothing_newer() {
    let (v2, v3) = (cut(CpuTemplate::V2), cut(CpuTemplate::V3));
    let (avx, avx2, avx512f) = (1 << 28, 1 << 5, 1 << 16);
    assert_eq!(of(&v2, 1, Ecx) & (avx | 1 << 26), 0, "no AVX, no XSAVE");
    assert_eq!(of(&v3, 1, Ecx) & (avx | 1 << 26), avx | 1 << 26);
    assert_eq!(of(&v2, 7, Ebx), 0);
    assert_eq!(of(&v3, 7, Ebx) & (avx2 | avx512f), avx2);
    for table in [&v2, &v3] {
        assert_eq!(of(table, 1, Ecx) & (1 << 20 | 1 << 23), 1 << 20 | 1 << 23, "SSE4.2, POPCNT");
        assert_eq!(of(table, AMD_FEATURES, Edx) & 1 << 29, 1 << 29, "long mode");
        assert_eq!(of(table, KVM_FEATURES, Eax) & 1 << 3, 1 << 3, "kvmclock");
        assert_eq!(of(table, 7, Edx) & 1 << 26, 1 << 26, "mitigations stay");
        assert_eq!(of(table, 7, Ecx) | of(table, 0x8000_0021, Eax), 0);
        assert_eq!(cpuid::physical_bits(table), 39);
        assert!(cpuid::find(table, 0x14, 0).is_none() && cpuid::find(table, 7, 1).is_none());
    }
    assert!(v2.iter().all(|entry| entry.function != XSAVE));
    assert_eq!((of(&v2, 0, Eax), of(&v3, 0, Eax)), (0xc, 0xd));
    assert_eq!((cpuid::xcr0(&v2), cpuid::xcr0(&v3)), (None, Some(7)));
    assert!(cpuid::find(&v3, XSAVE, 2).is_some() && cpuid::find(&v3, XSAVE, 5).is_none());
}

/// What a guest of a template has, any host of that level has: the smallest that there can be.
#[test]
fn a_guest_of_a_template_is_the_same_on_every_host_of_its_level() {
    for template in [CpuTemplate::V2, CpuTemplate::V3] {
        let from_large = cut(template);
        let mut small = from_large.clone();
        template.apply(&mut small).unwrap();
        assert_eq!(small, from_large, "what is cut already is not cut further");
        assert!(template.excess(&from_large).is_empty());
    }
    assert!(CpuTemplate::V3.excess(&cut(CpuTemplate::V2)).is_empty());
    let more = CpuTemplate::V2.excess(&cut(CpuTemplate::V3));
    assert!(more.contains(&"AVX2".to_owned()) && !more.contains(&"SSE4.2".to_owned()), "{more:?}");
    assert_eq!(cut(CpuTemplate::Host), everything());
}

#[test]
fn a_host_below_the_level_is_told_what_it_lacks() {
    let mut old = cut(CpuTemplate::V2);
    let error = CpuTemplate::V3.apply(&mut old).unwrap_err();
    let said = error.to_string();
    assert!(said.starts_with("this host is not x86-64-v3: it lacks "), "{said}");
    for name in ["AVX2", "FMA", "BMI2", "MOVBE", "LZCNT", "the state of AVX"] {
        assert!(said.contains(name), "{name}: {said}");
    }
    assert_eq!(old, cut(CpuTemplate::V2), "and nothing is cut");
}

#[test]
fn names() {
    for template in CpuTemplate::ALL {
        assert_eq!(template.name().parse(), Ok(template));
        assert_eq!(template.to_string().parse(), Ok(template));
    }
    assert!("v4".parse::<CpuTemplate>().is_err());
}
