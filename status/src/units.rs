//! Numbers for people.

/// A byte count, in the unit that fits.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A time: `120 ms`, `2.5 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`.
pub(crate) fn time(ms: f64) -> String {
    if !ms.is_finite() || ms < 0.0 {
        return "-".into();
    }
    let s = (ms / 1000.0).round() as u64;
    match s {
        _ if ms < 1000.0 => format!("{ms:.0} ms"),
        _ if ms < 60_000.0 => format!("{:.1} s", ms / 1000.0),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!((bytes(12), bytes(1536)), ("12 B".into(), "1.5 KiB".into()));
        for (ms, text) in [
            (120.4, "120 ms"),
            (2500.0, "2.5 s"),
            (59_990.0, "60.0 s"),
            (200_000.0, "3 min 20 s"),
            (7_500_000.0, "2 h 5 min"),
            (273_600_000.0, "3 d 4 h"),
            (f64::NAN, "-"),
        ] {
            assert_eq!(time(ms), text);
        }
    }
}
