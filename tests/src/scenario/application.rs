//! An application that somebody uses while the guest is handed off.

use anyhow::{Result, bail};
use howdah_apps::client::Application;
use serde::Deserialize;

/// Which application, and how it is used.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ApplicationPlan {
    /// Which: the image must have a workload of this name.
    pub(crate) name: Application,
    /// Requests due in a second; 0 for as many as are answered.
    #[serde(default)]
    pub(crate) rate_hz: f64,
    /// How many may be unanswered at once.
    #[serde(default = "one_at_a_time")]
    pub(crate) outstanding: u16,
    /// What the requests follow from.
    #[serde(default = "first_seed")]
    pub(crate) seed: u64,
    /// Go on with the next step once so many were answered.
    #[serde(default = "some_answers")]
    pub(crate) warm_up: u64,
    /// How long that may take.
    #[serde(default = "some_minutes")]
    pub(crate) within_s: f64,
}

fn one_at_a_time() -> u16 {
    1
}

fn first_seed() -> u64 {
    1
}

fn some_answers() -> u64 {
    5
}

fn some_minutes() -> f64 {
    240.0
}

impl ApplicationPlan {
    /// The workload of the image that serves it.
    pub(crate) fn workload(&self) -> &'static str {
        self.name.name()
    }

    pub(super) fn validate(&self) -> Result<()> {
        if !(0.0..=10_000.0).contains(&self.rate_hz) {
            bail!("rate_hz = {}: use 0 (as fast as answers come) to 10000", self.rate_hz);
        }
        if !(1..=1024).contains(&self.outstanding) {
            bail!("outstanding = {}: use 1 to 1024", self.outstanding);
        }
        if !(0.0..=3600.0).contains(&self.within_s) {
            bail!("within_s = {}: use 0 to 3600", self.within_s);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::scenario::Scenario;

    fn parse(step: &str) -> Result<Scenario, String> {
        let text = format!(
            "name = 'x'\ndescription = 'd'\nends_on = 'a'\nsteps = [{{ do = 'start' }}, {step}]\n"
        );
        Scenario::parse(&text).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn an_application_is_one_that_there_is_and_there_is_one() {
        let scenario = parse("{ do = 'application', name = 'ar', rate_hz = 2 }").unwrap();
        let plan = scenario.application().unwrap();
        assert_eq!((plan.workload(), plan.rate_hz, plan.outstanding), ("ar", 2.0, 1));
        for (step, word) in [
            ("{ do = 'application', name = 'chess' }", "chess"),
            ("{ do = 'application', name = 'ar', rate = 2 }", "rate"),
            ("{ do = 'application', name = 'ar', rate_hz = -1 }", "rate_hz"),
            ("{ do = 'application', name = 'ar', outstanding = 0 }", "outstanding"),
            ("{ do = 'application', name = 'ar' }, { do = 'application', name = 'ar' }", "second"),
        ] {
            let error = parse(step).unwrap_err();
            assert!(error.contains(word), "{step}: {error}");
        }
    }
}
