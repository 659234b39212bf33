//! Reads what the lab needs from howdah's report, and nothing more: reports may grow.

use serde_json::Value;

/// A number of the report.
pub(crate) fn number(report: &Value, key: &str) -> Option<f64> {
    report.get(key).and_then(Value::as_f64)
}

/// Bytes on the link, both directions.
pub(crate) fn bytes_on_link(report: &Value) -> Option<u64> {
    report.get("bytes_on_link").and_then(Value::as_u64)
}

/// How many rounds: a list in the report.
pub(crate) fn rounds(report: &Value) -> Option<u64> {
    match report.get("rounds")? {
        Value::Array(rounds) => Some(rounds.len() as u64),
        other => other.as_u64(),
    }
}

/// The hash of all RAM and disk that a side computed while the guest was paused.
pub(crate) fn audit_hash(report: &Value) -> Option<String> {
    report.get("full_hash").and_then(Value::as_str).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rounds_are_counted_or_read() {
        assert_eq!(rounds(&json!({ "rounds": [{}, {}] })), Some(2));
        assert_eq!(rounds(&json!({ "rounds": 3 })), Some(3));
        assert_eq!(rounds(&json!({})), None);
    }
}
