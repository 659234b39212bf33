//! The homes of cloudlets. An image is imported once a lab host, then copied to who needs it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use super::{copy::copy_tree, net::Network, product::Cloudlet};
use crate::scenario::{Link, Scenario, Side};

/// Where the lab shows the image directories.
pub(crate) const IMAGES: &str = "/images";

/// Homes that hold one imported base each, by image.
pub(crate) struct Stores {
    dir: PathBuf,
}

impl Stores {
    /// Imports the images that these scenarios use.
    pub(crate) fn import(scenarios: &[Scenario], logs: &Path) -> Result<Self> {
        let stores = Self { dir: "/run/stores".into() };
        // howdah runs in a cloudlet's namespace, for imports too.
        let _network = Network::build(Link::default())?;
        fs::create_dir_all(logs).with_context(|| format!("cannot make {}", logs.display()))?;
        for scenario in scenarios {
            let home = stores.dir.join(&scenario.vm.image);
            if !home.exists() {
                fs::create_dir_all(&home)?;
                let cloudlet = Cloudlet { side: Side::A, home, logs: logs.to_owned() };
                cloudlet.import(&Path::new(IMAGES).join(&scenario.vm.image))?;
            }
        }
        Ok(stores)
    }

    /// Makes the homes of both cloudlets below `work`.
    pub(crate) fn furnish(&self, scenario: &Scenario, work: &Path) -> Result<[PathBuf; 2]> {
        let imported = self.dir.join(&scenario.vm.image);
        let (a, b) = (work.join("a"), work.join("b"));
        copy_tree(&imported, &a)?;
        fs::create_dir_all(&b)?;
        if let Some(free_mib) = scenario.cloudlet_b.free_mib {
            let base_mib = used_bytes(&imported)?.div_ceil(1 << 20);
            let size = format!("size={}m", base_mib + u64::from(free_mib));
            mount(Some("b"), &b, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
                .with_context(|| format!("cannot mount a tmpfs at {}", b.display()))?;
        }
        if scenario.cloudlet_b.has_base {
            copy_tree(&imported, &b)?;
        }
        Ok([a, b])
    }
}

/// What a tree takes on its file system.
fn used_bytes(dir: &Path) -> Result<u64> {
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
