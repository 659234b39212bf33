//! One switch for each optimisation, so that what it is worth can be measured.

use super::delta::DeltaMode;

/// What the stages may do. All is on by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageOptions {
    /// What the target holds already, from base or from this handoff, is not sent.
    pub unchanged: bool,
    /// A chunk that went back to its base state is sent as that.
    pub reset: bool,
    /// Zeros are sent as such.
    pub zero: bool,
    /// Contents are looked up in the disk, kernel and initramfs of the VM's base.
    pub base_disk: bool,
    /// Contents are looked up in the memory of the VM's base.
    pub base_memory: bool,
    /// Contents are looked up in other bases that both ends hold.
    pub other_bases: bool,
    /// Contents are looked up among what was sent before.
    pub seen: bool,
    /// What the target holds from an earlier visit of this VM is not sent.
    pub known: bool,
    /// Memory that the guest has free is not sent: the guest is asked for hints.
    pub free: bool,
    /// Which deltas are made.
    pub delta: DeltaMode,
    /// Bytes of chunks sent that the source keeps as references of deltas.
    pub delta_cache_bytes: usize,
}

/// The default of [`StageOptions::delta_cache_bytes`].
pub const DELTA_CACHE_BYTES: usize = 24 << 20;

impl Default for StageOptions {
    fn default() -> Self {
        Self {
            unchanged: true,
            reset: true,
            zero: true,
            base_disk: true,
            base_memory: true,
            other_bases: true,
            seen: true,
            known: true,
            free: true,
            delta: DeltaMode::default(),
            delta_cache_bytes: DELTA_CACHE_BYTES,
        }
    }
}

/// A name that is no switch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no optimisation {name:?}; there are: {}", StageOptions::SWITCHES.join(", "))]
pub struct UnknownSwitch {
    /// The name.
    pub name: String,
}

impl StageOptions {
    /// The names of all that can be switched off by [`StageOptions::switch_off`]. Deltas have
    /// their mode instead.
    pub const SWITCHES: [&str; 9] = [
        "unchanged",
        "reset",
        "zero",
        "base-disk",
        "base-memory",
        "other-bases",
        "seen",
        "known",
        "free",
    ];

    /// Switches one optimisation off.
    pub fn switch_off(&mut self, name: &str) -> Result<(), UnknownSwitch> {
        let switch = match name {
            "unchanged" => &mut self.unchanged,
            "reset" => &mut self.reset,
            "zero" => &mut self.zero,
            "base-disk" => &mut self.base_disk,
            "base-memory" => &mut self.base_memory,
            "other-bases" => &mut self.other_bases,
            "seen" => &mut self.seen,
            "known" => &mut self.known,
            "free" => &mut self.free,
            _ => return Err(UnknownSwitch { name: name.to_owned() }),
        };
        *switch = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_switch_is_one_of_its_own() {
        let mut seen = vec![StageOptions::default()];
        for name in StageOptions::SWITCHES {
            let mut options = StageOptions::default();
            options.switch_off(name).unwrap();
            assert!(!seen.contains(&options), "{name}");
            seen.push(options);
        }
        let error = StageOptions::default().switch_off("delta").unwrap_err();
        assert!(error.to_string().contains("base-memory"), "{error}");
    }
}
