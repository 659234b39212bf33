//! Figures as people read them: three digits, and the unit that fits. Sizes are decimal, as links
//! and the tables of papers have them.

/// A time.
pub(crate) fn time(ms: f64) -> String {
    match ms {
        0.0 => "0 ms".into(),
        ms if ms < 0.95 => format!("{ms:.2} ms"),
        ms if ms < 999.5 => format!("{} ms", digits(ms)),
        ms if ms < 599_500.0 => format!("{} s", digits(ms / 1e3)),
        ms => format!("{} min", digits(ms / 6e4)),
    }
}

/// A time in seconds, without the unit: for tables that name it once.
pub(crate) fn seconds(ms: f64) -> String {
    match ms / 1e3 {
        s if s < 9.995 => format!("{s:.2}"),
        s if s < 999.95 => format!("{s:.1}"),
        s => format!("{s:.0}"),
    }
}

/// A number of bytes.
pub(crate) fn bytes(bytes: f64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 999.5 {
        return format!("{bytes:.0} B");
    }
    let (mut value, mut unit) = (bytes / 1e3, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1e3;
        unit += 1;
    }
    format!("{} {}", digits(value), UNITS[unit])
}

/// Megabytes, without the unit.
pub(crate) fn megabytes(bytes: f64) -> String {
    digits(bytes / 1e6)
}

/// A rate of a link.
pub(crate) fn rate(bytes_per_s: f64) -> String {
    let mbps = bytes_per_s * 8.0 / 1e6;
    if mbps == 0.0 {
        return "nothing".into();
    }
    if mbps < 0.9995 {
        return format!("{} kbit/s", digits(mbps * 1e3));
    }
    if mbps < 999.5 {
        format!("{} Mbit/s", digits(mbps))
    } else {
        format!("{} Gbit/s", digits(mbps / 1e3))
    }
}

/// A number of things, with its thousands set apart.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A share, in percent.
pub(crate) fn percent(share: f64) -> String {
    match share * 100.0 {
        p if p > 0.0 && p < 0.1 => "< 0.1 %".into(),
        p if p < 9.95 && p > 0.0 => format!("{p:.1} %"),
        p => format!("{p:.0} %"),
    }
}

/// How many times as much.
pub(crate) fn factor(factor: f64) -> String {
    match factor {
        f if f < 9.95 => format!("{f:.2}×"),
        f if f < 99.5 => format!("{f:.1}×"),
        f => format!("{f:.0}×"),
    }
}

/// A number as it was given: without a fraction if it has none.
pub(crate) fn plain(n: f64) -> String {
    if n.fract() == 0.0 { format!("{n:.0}") } else { format!("{n}") }
}

/// A figure that is round anyway, on an axis: `10 s` for `10.0 s`.
pub(crate) fn tick(figure: &str) -> String {
    let (number, unit) = figure.split_at(figure.find(' ').unwrap_or(figure.len()));
    let number = if number.contains('.') { number.trim_end_matches('0') } else { number };
    format!("{}{unit}", number.trim_end_matches('.'))
}

/// Three digits, or more before the point.
pub(crate) fn digits(n: f64) -> String {
    match n {
        0.0 => "0".into(),
        n if n < 0.0095 => format!("{n:.4}"),
        n if n < 9.995 => format!("{n:.2}"),
        n if n < 99.95 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_well() {
        assert_eq!(
            [0.4, 12.34, 999.9, 15_714.0, 6_243_000.0].map(time),
            ["0.40 ms", "12.3 ms", "1.00 s", "15.7 s", "104 min"]
        );
        assert_eq!([2_500.0, 15_714.0, 6_243_000.0].map(seconds), ["2.50", "15.7", "6243"]);
        assert_eq!(
            [0.0, 999.0, 12_472_535.0, 6.899e9].map(bytes),
            ["0 B", "999 B", "12.5 MB", "6.90 GB"]
        );
        assert_eq!(
            [1_203_678.0, 62.5e3, 125e6].map(rate),
            ["9.63 Mbit/s", "500 kbit/s", "1.00 Gbit/s"]
        );
        assert_eq!(
            [7, 18_554, 1_234_567].map(count),
            ["7", "18\u{202f}554", "1\u{202f}234\u{202f}567"]
        );
        assert_eq!([0.0, 0.0005, 0.034, 0.5531].map(percent), ["0 %", "< 0.1 %", "3.4 %", "55 %"]);
        assert_eq!([1.1, 14.25, 396.7].map(factor), ["1.10×", "14.2×", "397×"]);
        assert_eq!([10.0, 2.5].map(plain), ["10", "2.5"]);
        assert_eq!(["10.0 s", "2.50", "100 kB", "0"].map(tick), ["10 s", "2.5", "100 kB", "0"]);
    }
}
