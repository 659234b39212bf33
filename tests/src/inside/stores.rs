//! The homes of cloudlets. An image is imported once a lab host, and a base with memory built once;
//! then every cloudlet that needs one gets it.
//!
//! Large files of a base are given as hard links: they never change, and the lab host's files live in
//! its memory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::{
    copy::{copy_tree, link_tree},
    net::Network,
    product::Cloudlet,
};
use crate::scenario::{Link, Scenario, Side, VmPlan};

/// Where the lab shows the image directories.
pub(crate) const IMAGES: &str = "/images";

/// Homes that hold what VMs start from, by image and, with memory, by machine.
pub(crate) struct Stores {
    dir: PathBuf,
}

impl Stores {
    /// Imports the images that these scenarios use, and builds their bases with memory.
    pub(crate) fn import(scenarios: &[Scenario], logs: &Path) -> Result<Self> {
        let stores = Self { dir: "/run/stores".into() };
        // howdah runs in a cloudlet's namespace, for imports too.
        let _network = Network::build(Link::default())?;
        fs::create_dir_all(logs).with_context(|| format!("cannot make {}", logs.display()))?;
        for scenario in scenarios {
            let plan = &scenario.vm;
            let home = stores.dir.join(&plan.image);
            let cloudlet = |home| Cloudlet::new(Side::A, home, logs);
            if !home.exists() {
                fs::create_dir_all(&home)?;
                cloudlet(home.clone()).import(&Path::new(IMAGES).join(&plan.image))?;
            }
            let with_memory = stores.home_of(plan);
            if !with_memory.exists() {
                link_tree(&home, &with_memory)?;
                cloudlet(with_memory).build_memory(plan)?;
            }
        }
        Ok(stores)
    }

    /// The home with what VMs of this plan start from.
    fn home_of(&self, plan: &VmPlan) -> PathBuf {
        let VmPlan { image, memory_mib, vcpus, append, base_memory } = plan;
        if !base_memory {
            return self.dir.join(image);
        }
        let append = blake3::hash(append.as_bytes()).to_hex();
        let append = append.get(..8).unwrap_or_default();
        self.dir.join(format!("{image},{memory_mib},{vcpus},{append}"))
    }

    /// Makes the homes of both cloudlets below `work`.
    pub(crate) fn furnish(&self, scenario: &Scenario, work: &Path) -> Result<[PathBuf; 2]> {
        let imported = self.home_of(&scenario.vm);
        let (a, b) = (work.join("a"), work.join("b"));
        link_tree(&imported, &a)?;
        fs::create_dir_all(&b)?;
        if let Some(free_mib) = scenario.cloudlet_b.free_mib {
            let base_mib = used_bytes(&imported)?.div_ceil(1 << 20);
            let size = format!("size={}m", base_mib + u64::from(free_mib));
            mount(Some("b"), &b, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
                .with_context(|| format!("cannot mount a tmpfs at {}", b.display()))?;
        }
        match (scenario.cloudlet_b.has_base, scenario.cloudlet_b.free_mib) {
            (false, _) => {}
            // Another file system.
            (true, Some(_)) => copy_tree(&imported, &b)?,
            (true, None) => link_tree(&imported, &b)?,
        }
        Ok([a, b])
    }
}

/// What a tree takes on its file system.
pub(super) fn used_bytes(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut used = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        let meta = entry.metadata()?;
        used += meta.blocks() * 512;
        if meta.is_dir() {
            used += used_bytes(&entry.path())?;
        }
    }
    Ok(used)
}
