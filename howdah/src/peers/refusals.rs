//! One line for each kind of refusal and who caused it, however often it happens.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use super::quota::household;

/// The same is said again only after so long.
const QUIET: Duration = Duration::from_secs(60);
/// Different refusals that are remembered; beyond them, new ones share one line.
const MAX_REMEMBERED: usize = 256;

/// What was said lately.
#[derive(Debug, Default)]
pub(crate) struct Refusals(Mutex<HashMap<Option<(IpAddr, String)>, Said>>);

#[derive(Debug)]
struct Said {
    at: Duration,
    since: u64,
}

impl Refusals {
    /// The line for a refusal, unless it was said lately: with how often it happened since.
    pub(crate) fn line(&self, address: IpAddr, why: &str, now: Duration) -> Option<String> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut of = Some((household(address), why.to_owned()));
        if said.len() >= MAX_REMEMBERED && !said.contains_key(&of) {
            said.retain(|_, said| now.saturating_sub(said.at) < QUIET);
            if said.len() >= MAX_REMEMBERED {
                of = None;
            }
        }
        let Some(before) = said.get_mut(&of) else {
            said.insert(of, Said { at: now, since: 0 });
            return Some(why.to_owned());
        };
        if now.saturating_sub(before.at) < QUIET {
            before.since += 1;
            return None;
        }
        let often = std::mem::take(&mut before.since);
        before.at = now;
        Some(if often == 0 { why.to_owned() } else { format!("{why} ({often} more since)") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_a_while() {
        let refusals = Refusals::default();
        let (a, b): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let s = Duration::from_secs;
        assert_eq!(refusals.line(a, "x", s(0)).as_deref(), Some("x"));
        assert_eq!(refusals.line(b, "x", s(0)).as_deref(), Some("x"));
        assert_eq!(refusals.line(a, "y", s(1)).as_deref(), Some("y"));
        assert_eq!(refusals.line(a, "x", s(59)), None);
        assert_eq!(refusals.line(a, "x", s(60)).as_deref(), Some("x (1 more since)"));
        assert_eq!(refusals.line(a, "x", s(120)).as_deref(), Some("x"));
    }

    #[test]
    fn a_flood_is_remembered_in_bounds() {
        let refusals = Refusals::default();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let said = (0..10_000).filter_map(|n| refusals.line(address(n), "x", Duration::ZERO));
        assert_eq!(said.count(), MAX_REMEMBERED + 1);
        let remembered = refusals.0.lock().unwrap().len();
        assert!(remembered <= MAX_REMEMBERED + 1, "{remembered}");
    }
}
