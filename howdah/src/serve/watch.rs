//! Finds out what changes of VMs, for those who follow.
//!
//! VMs are processes of their own, and commands go to them directly: the daemon is not told. So it
//! looks, as long as somebody follows what happens and not otherwise.

use std::{collections::HashMap, sync::Arc, time::Duration};

use howdah_api::{Event, Vm};

use super::{answer::blocking, daemon::Daemon};
use crate::ops;

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks until the daemon is to end.
pub(super) async fn run(daemon: Arc<Daemon>) {
    let mut known: HashMap<String, Vm> = HashMap::new();
    loop {
        tokio::select! {
            () = daemon.changed.notified() => {}
            () = tokio::time::sleep(LOOK_EVERY), if daemon.followers() > 0 => {}
            () = daemon.stopped() => return,
        }
        if daemon.followers() == 0 {
            // Who follows next is told everything anew.
            known.clear();
            continue;
        }
        let shared = Arc::clone(&daemon);
        match blocking(move || ops::vm::list(&shared.home)).await {
            Ok(vms) => compare(&mut known, vms).into_iter().for_each(|event| daemon.tell(event)),
            Err(refused) => tracing::warn!("VMs cannot be looked at: {refused:?}"),
        }
    }
}

/// What is different from before.
fn compare(known: &mut HashMap<String, Vm>, vms: Vec<Vm>) -> Vec<Event> {
    let now: HashMap<String, Vm> = vms.into_iter().map(|vm| (vm.name.clone(), vm)).collect();
    let gone = known.keys().filter(|name| !now.contains_key(*name));
    let gone = gone.map(|name| Event::VmGone { name: name.clone() });
    let changed = now.values().filter(|vm| known.get(&vm.name) != Some(vm));
    let changed = changed.map(|vm| Event::Vm { vm: Box::new(vm.clone()) });
    let events = gone.chain(changed).collect();
    *known = now;
    events
}

#[cfg(test)]
mod tests {
    use howdah_api::VmState;

    use super::*;

    fn vm(name: &str, state: VmState) -> Vm {
        let name = name.to_owned();
        Vm {
            name,
            state,
            process: None,
            record: None,
            config: None,
            last_report: None,
            kept_bytes: None,
            problems: Vec::new(),
        }
    }

    #[test]
    fn only_what_changed_is_told() {
        let mut known = HashMap::new();
        let running = vm("a", VmState::Running);
        assert_eq!(
            compare(&mut known, vec![running.clone()]),
            [Event::Vm { vm: Box::new(running.clone()) }]
        );
        assert!(compare(&mut known, vec![running]).is_empty());
        let paused = vm("a", VmState::Paused);
        assert_eq!(compare(&mut known, vec![paused.clone()]), [Event::Vm { vm: Box::new(paused) }]);
        assert_eq!(compare(&mut known, Vec::new()), [Event::VmGone { name: "a".into() }]);
    }
}
