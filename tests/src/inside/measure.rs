//! Figures beside those of handoffs: what the guest's agent says, asked once or again and again.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::guest;

/// How often the agent is asked while something is awaited.
const EVERY: Duration = Duration::from_millis(200);
/// A guest that nobody reaches for so long is not busy but lost.
const SILENT: Duration = Duration::from_secs(90);

/// Asks until a number of the answer is large enough; returns how long that took.
///
/// A guest that is too busy to answer, as one that loads a large program on an emulated CPU can be for
/// seconds, is asked again: what counts is what it has done in the end. One whose VM has ended is not,
/// nor one that is silent for [`SILENT`].
pub(crate) fn wait_for(
    command: &str,
    field: &str,
    at_least: f64,
    within: Duration,
) -> Result<Duration> {
    let started = Instant::now();
    let mut heard = started;
    loop {
        let value = guest::ask_once(command).and_then(|answer| number(&answer, field));
        if value.as_ref().is_ok_and(|value| *value >= at_least) {
            return Ok(started.elapsed());
        }
        let unreachable = value.as_ref().is_err_and(|error| error.is::<guest::Unreachable>());
        let lost = match unreachable {
            true if !guest::any_vm()? => Some("the guest's VM has ended"),
            true => (heard.elapsed() > SILENT).then_some("the guest is silent"),
            false => {
                heard = Instant::now();
                None
            }
        };
        if let Some(lost) = lost {
            return value.map(|_| started.elapsed()).with_context(|| format!("{command}: {lost}"));
        }
        if started.elapsed() > within {
            let limit_s = within.as_secs_f64();
            let value = value.with_context(|| format!("{command}: no answer after {limit_s} s"))?;
            bail!("{command}: {field} is {value} after {limit_s} s and should be {at_least}");
        }
        thread::sleep(EVERY);
    }
}

/// Asks once; returns the numbers of the answer, in the order of `fields`.
pub(crate) fn numbers(command: &str, fields: &[String]) -> Result<Vec<f64>> {
    let answer = guest::ask(command)?;
    fields.iter().map(|field| number(&answer, field)).collect()
}

fn number(answer: &Value, field: &str) -> Result<f64> {
    let value = answer.get(field).and_then(Value::as_f64);
    value.with_context(|| format!("the agent's answer has no number {field}: {answer}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_found_or_missed_by_name() {
        let answer = json!({ "ok": true, "count": 3, "rate": 1.5 });
        assert_eq!(number(&answer, "count").unwrap(), 3.0);
        assert_eq!(number(&answer, "rate").unwrap(), 1.5);
        let error = number(&answer, "speed").unwrap_err().to_string();
        assert!(error.contains("no number speed"), "{error}");
    }
}
