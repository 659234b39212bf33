//! The fluid that a guest showed its user, held against the one that its readings give.

use std::path::Path;

use anyhow::{Context, Result};
use howdah_apps::{
    client::{Application, Films},
    record::Record,
};

use crate::{inside::REQUESTS, results::Outcome};

/// Adds the check, where the guest ran the fluid. Outside the lab host, because it computes every
/// frame again, and an emulated CPU has better things to do.
pub(crate) fn check(outcome: &mut Outcome, logs: &Path) {
    if outcome.application != Some(Application::Fluid) || outcome.error.is_some() {
        return;
    }
    let (same, detail) = match compare(&logs.join(REQUESTS)) {
        Ok(Films { compared, different, first_different }) => {
            let first = first_different.map(|seq| format!(", first that of request {seq}"));
            let detail = format!(
                "of {compared} frames {different} are not what their readings give{}",
                first.unwrap_or_default()
            );
            (compared > 0 && different == 0, detail)
        }
        Err(error) => (false, format!("{error:#}")),
    };
    if !same {
        // Its line was said inside the lab host, before this was known.
        crate::say(&format!("FAILED {}: same-water: {detail}", outcome.name));
    }
    outcome.check("same-water", same, detail);
    outcome.conclude();
}

fn compare(file: &Path) -> Result<Films> {
    let record = Record::read(file)?;
    Films::compare(&record).with_context(|| format!("{}", file.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn checked(application: Application, requests: &str) -> Outcome {
        let logs = tempfile::tempdir().unwrap();
        fs::write(logs.path().join(REQUESTS), requests).unwrap();
        let mut outcome = Outcome { application: Some(application), ..Outcome::default() };
        outcome.check("one-owner", true, "");
        check(&mut outcome, logs.path());
        outcome
    }

    #[test]
    fn water_that_cannot_be_compared_does_not_pass() {
        let run = r#"{"run":{"application":"fluid","seed":1,"rate_hz":2.0,"outstanding":1}}"#;
        for requests in ["", run] {
            let outcome = checked(Application::Fluid, requests);
            assert!(!outcome.passed && outcome.checks.len() == 2, "{requests:?}");
        }
        let outcome = checked(Application::Faces, "");
        assert_eq!((outcome.checks.len(), outcome.passed), (1, false));
    }
}
