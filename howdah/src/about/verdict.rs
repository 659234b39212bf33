//! Which VMs could go to a peer, and why the others could not.

use serde::Serialize;
use vmm::MachineProfile;

use super::{About, Incoming};
use crate::{
    failure::one_line,
    home::{VmConfig, VmName},
};

/// What a VM needs of where it goes.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) vm: VmName,
    pub(crate) config: VmConfig,
    /// Its machine; why it is not known of a VM that could not go now.
    pub(crate) profile: Result<MachineProfile, String>,
}

/// Whether a VM could go.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) vm: VmName,
    pub(crate) could_go: bool,
    /// Everything that is in the way.
    pub(crate) why_not: Vec<String>,
}

/// Judges each VM. `forbidden` is why the peer may receive none, by what is said of it here.
pub(crate) fn verdicts(
    about: &About,
    forbidden: Option<&str>,
    allowed: impl Fn(&VmConfig) -> bool,
    candidates: &[Candidate],
) -> Vec<Verdict> {
    let judge = |candidate: &Candidate| {
        let mut why_not: Vec<String> = forbidden.map(str::to_owned).into_iter().collect();
        if let Err(why) = &about.takes {
            why_not.push(format!("it says: {why}"));
        }
        if !allowed(&candidate.config) {
            why_not
                .push("it may not receive VMs of this base (`howdah peer add ... --bases`)".into());
        }
        base(about, candidate, &mut why_not);
        machine(about, candidate, &mut why_not);
        room(about, candidate, &mut why_not);
        network(about, candidate, &mut why_not);
        Verdict { vm: candidate.vm.clone(), could_go: why_not.is_empty(), why_not }
    };
    candidates.iter().map(judge).collect()
}

fn base(about: &About, candidate: &Candidate, why_not: &mut Vec<String>) {
    let id = &candidate.config.base;
    if !about.bases.iter().any(|base| base.id == *id) {
        why_not.push(format!("it does not hold base {id}, or not for us"));
    }
}

fn machine(about: &About, candidate: &Candidate, why_not: &mut Vec<String>) {
    match (&about.host, &candidate.profile) {
        (Err(why), _) => why_not.push(format!("its host runs no VMs: {why}")),
        (_, Err(why)) => why_not.push(why.clone()),
        (Ok(host), Ok(profile)) => {
            if let Err(lacks) = profile.check_compatible(host) {
                // The name of a CPU's maker is the peer's to say.
                why_not.extend(lacks.0.iter().map(|lack| one_line(&lack.to_string())));
            }
        }
    }
}

fn room(about: &About, candidate: &Candidate, why_not: &mut Vec<String>) {
    let needed = candidate.config.memory_mib;
    let available = about.available_memory_bytes >> 20;
    if needed > available {
        why_not.push(format!("{needed} MiB of memory are needed, {available} MiB are free there"));
    }
}

fn network(about: &About, candidate: &Candidate, why_not: &mut Vec<String>) {
    if candidate.config.mac.is_none() {
        return;
    }
    match (&about.network, &candidate.config.network) {
        (Incoming::Nothing, _) => {
            why_not.push("it gives guests no network (`howdah receive --tap`, `--network`)".into());
        }
        (Incoming::Network(theirs), Some(ours)) if *theirs != ours.subnet => {
            let ours = ours.subnet;
            why_not.push(format!("its network there is {theirs}, and the guest's {ours}"));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::about::HeldBase;

    fn about(base: &str) -> About {
        About {
            version: "1".into(),
            protocol: (3, 4),
            takes: Ok(()),
            host: Err("KVM is missing".into()),
            available_memory_bytes: 1 << 30,
            available_disk_bytes: 1 << 30,
            bases: vec![HeldBase { id: base.into(), names: vec!["edge".into()] }],
            network: Incoming::Nothing,
        }
    }

    fn candidate() -> Candidate {
        let config = VmConfig {
            memory_mib: 2048,
            mac: Some("02:00:00:00:00:01".into()),
            ..VmConfig::of(&guest_images::BaseId([7; 32]))
        };
        Candidate { vm: "web".parse().unwrap(), config, profile: Err("it is stopped".into()) }
    }

    #[test]
    fn everything_that_is_in_the_way_is_said() {
        let mut about = about("another");
        about.takes = Err("not from you".into());
        let candidates = [candidate()];
        let [verdict] = &verdicts(&about, None, |_| true, &candidates)[..] else { panic!("one") };
        assert!(!verdict.could_go);
        let said = verdict.why_not.join("\n");
        for part in
            ["not from you", "does not hold base", "KVM is missing", "2048 MiB", "no network"]
        {
            assert!(said.contains(part), "{part}: {said}");
        }
    }

    #[test]
    fn a_peer_cannot_speak_to_the_terminal() {
        let mut about = about("x\x1b[2J");
        about.version = "1\r\n2".into();
        about.takes = Err("\x07no".into());
        about.bases[0].names.push("\x1b]0;mine".into());
        let text = format!("{:?}", about.tamed());
        // Debug would show them escaped.
        assert!(!text.contains('\\'), "{text}");
    }

    #[test]
    fn what_a_peer_says_survives() {
        let about = about("x");
        let text = serde_json::to_string(&about).unwrap();
        let read: About = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (read.bases, read.network, read.host.is_err()),
            (about.bases, about.network, true)
        );
    }
}
