//! What strangers may have of a listener before it is known who they are.
//!
//! An address that calls too often or holds too many links waits for nobody but itself; all together
//! they can have no more threads and memory than [`Limits::at_once`] handshakes need.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Bounds on strangers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Links that are looked at at once.
    pub(crate) at_once: usize,
    /// Of those, from one address.
    pub(crate) of_address: usize,
    /// Links that an address may make in a row...
    pub(crate) burst: u32,
    /// ... and how long it takes to get one of them back.
    pub(crate) refill: Duration,
    /// Addresses that are remembered.
    pub(crate) addresses: usize,
}

impl Limits {
    /// Those of every listener of a cloudlet.
    pub(crate) const DEFAULT: Self = Self {
        at_once: 64,
        of_address: 8,
        burst: 40,
        refill: Duration::from_millis(250),
        addresses: 4096,
    };
}

/// Why a link is not even looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub(crate) enum Full {
    /// Too many altogether.
    #[error("too many links at once are not authenticated yet")]
    AtOnce,
    /// Too many of this address.
    #[error("too many links at once from that address are not authenticated yet")]
    OfAddress,
    /// The address called too often.
    #[error("too many links from that address in a short time")]
    TooOften,
}

/// Counts strangers.
#[derive(Clone, Debug)]
pub(crate) struct Quota(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    at_once: usize,
    callers: HashMap<IpAddr, Caller>,
}

#[derive(Debug)]
struct Caller {
    at_once: usize,
    /// When its links will all be given back, if it makes no more.
    idle_at: Duration,
}

/// One stranger's place; free again when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    quota: Quota,
    address: IpAddr,
}

impl Quota {
    pub(crate) fn new(limits: Limits) -> Self {
        Self(Arc::new(Inner { limits, state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a link from `address` in, at `now` of any monotonic clock.
    pub(crate) fn enter(&self, address: IpAddr, now: Duration) -> Result<Place, Full> {
        let (limits, address) = (self.0.limits, household(address));
        let mut state = self.state();
        if state.at_once >= limits.at_once {
            return Err(Full::AtOnce);
        }
        if state.callers.len() >= limits.addresses && !state.callers.contains_key(&address) {
            state.callers.retain(|_, caller| caller.at_once > 0 || caller.idle_at > now);
            if state.callers.len() >= limits.addresses {
                return Err(Full::AtOnce);
            }
        }
        let caller = state.callers.entry(address).or_insert(Caller { at_once: 0, idle_at: now });
        if caller.at_once >= limits.of_address {
            return Err(Full::OfAddress);
        }
        let idle_at = caller.idle_at.max(now) + limits.refill;
        if idle_at.saturating_sub(now) > limits.refill * limits.burst {
            return Err(Full::TooOften);
        }
        caller.idle_at = idle_at;
        caller.at_once += 1;
        state.at_once += 1;
        Ok(Place { quota: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.quota.state();
        state.at_once = state.at_once.saturating_sub(1);
        if let Some(caller) = state.callers.get_mut(&self.address) {
            caller.at_once = caller.at_once.saturating_sub(1);
        }
    }
}

/// Whom an address stands for: with IPv6 anyone has 2^64 of them.
pub(crate) fn household(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        at_once: 5,
        of_address: 2,
        burst: 4,
        refill: Duration::from_secs(1),
        addresses: 8,
    };

    fn address(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[test]
    fn one_address_cannot_take_all() {
        let quota = Quota::new(LIMITS);
        let now = Duration::ZERO;
        let places: Vec<_> = (0..2).map(|_| quota.enter(address(1), now).unwrap()).collect();
        assert_eq!(quota.enter(address(1), now).unwrap_err(), Full::OfAddress);
        let other = quota.enter(address(2), now).unwrap();
        drop(places);
        let again: Vec<_> = (0..2).map(|_| quota.enter(address(1), now).unwrap()).collect();
        drop(again);
        assert_eq!(quota.enter(address(1), now).unwrap_err(), Full::TooOften);
        quota.enter(address(1), Duration::from_secs(1)).unwrap();
        drop(other);
    }

    #[test]
    fn all_together_have_a_bound() {
        let quota = Quota::new(LIMITS);
        let now = Duration::ZERO;
        let _places: Vec<_> = (0..5).map(|n| quota.enter(address(n), now).unwrap()).collect();
        assert_eq!(quota.enter(address(9), now).unwrap_err(), Full::AtOnce);
    }

    #[test]
    fn addresses_of_one_household_count_as_one() {
        let of = |text: &str| household(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
    }

    proptest! {
        #[test]
        fn bounds_hold_whoever_comes_and_goes(
            steps in prop::collection::vec((any::<u8>(), 0..400u64, any::<bool>()), 0..200)
        ) {
            let quota = Quota::new(LIMITS);
            let (mut places, mut now) = (Vec::new(), Duration::ZERO);
            for (n, ms, leaves) in steps {
                now += Duration::from_millis(ms);
                if leaves {
                    places.pop();
                } else if let Ok(place) = quota.enter(address(n % 16), now) {
                    places.push(place);
                }
                let state = quota.state();
                prop_assert_eq!(state.at_once, places.len());
                prop_assert!(state.at_once <= LIMITS.at_once);
                prop_assert!(state.callers.len() <= LIMITS.addresses);
                prop_assert!(state.callers.values().all(|c| c.at_once <= LIMITS.of_address));
            }
        }
    }
}
