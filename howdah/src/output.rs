//! What goes to the user: text for people, or one JSON document for programs.
//!
//! Colours are for terminals only: what is printed passes a stream that takes them out elsewhere, and
//! where NO_COLOR asks for it.

use std::io::{self, Write};

use anstyle::AnsiColor;
use serde::Serialize;

use crate::failure::Failure;

/// Where results go and in which shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    /// JSON instead of text when `json`.
    pub(crate) fn new(json: bool) -> Self {
        Self { json, quiet: false }
    }

    /// Without progress, remarks and words about what went well, if `quiet`.
    pub(crate) fn quietly(self, quiet: bool) -> Self {
        Self { quiet, ..self }
    }

    /// Whether only what was asked for is wanted.
    pub(crate) fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Whether programs are listening.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// Prints the result of a command: `value` for programs, `text` for people.
    pub(crate) fn result<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) {
        let shown = if self.json {
            serde_json::to_string_pretty(value).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
        } else {
            text(value)
        };
        put(&mut anstream::stdout(), shown.trim_end());
    }

    /// Says that a command did what it was told; programs get `value`, who wants quiet nothing.
    pub(crate) fn done<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) {
        if self.json || !self.quiet {
            self.result(value, text);
        }
    }

    /// Prints a list: a table for people, the names alone where quiet is wanted.
    pub(crate) fn list<T: Serialize, N: ToString>(
        self,
        items: &[T],
        name: impl Fn(&T) -> N,
        text: impl FnOnce(&[T]) -> String,
    ) {
        self.result(&items, |items| {
            if self.quiet {
                let names: Vec<_> = items.iter().map(|item| name(item).to_string()).collect();
                return names.join("\n");
            }
            text(items)
        });
    }

    /// A remark for people that is no result: on stderr, so that stdout stays parsable.
    pub(crate) fn note(self, text: &str) {
        if !self.quiet {
            put(&mut anstream::stderr(), text);
        }
    }

    /// The line for a failed command; programs get it on stdout too.
    pub(crate) fn failure(self, failure: &Failure) {
        if self.json {
            let mut value = serde_json::json!({
                "error": { "exit": failure.exit as u8, "kind": failure.exit, "message": failure.message }
            });
            if let (Some(report), Some(fields)) = (&failure.report, value.as_object_mut()) {
                fields.insert("report".into(), report.clone());
            }
            put(&mut io::stdout(), &format!("{value:#}"));
        }
        let name = AnsiColor::Red.on_default().bold();
        put(&mut anstream::stderr(), &format!("{name}howdah:{name:#} {failure}"));
    }
}

/// Prints a line. A reader that went away (`howdah vm ls | head -1`) is no error.
fn put(to: &mut impl Write, text: &str) {
    if !text.is_empty() {
        let _ = writeln!(to, "{text}").and_then(|()| to.flush());
    }
}

/// Lays rows out in columns under a heading.
pub(crate) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let mut width = heading.map(str::len);
    for row in rows {
        for (w, cell) in width.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let padded = cells.iter().zip(width).map(|(cell, w)| format!("{cell:<w$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(heading)];
    lines.extend(rows.iter().map(|row| line(row.each_ref().map(String::as_str))));
    lines.join("\n")
}

/// What became of the chunks of a report, as tables below its first line.
pub(crate) fn shares(report: &serde_json::Value) -> String {
    let mut text = String::new();
    for (key, heading) in [("classes", "CLASS"), ("stages", "STAGE")] {
        let shares = report.get(key).and_then(serde_json::Value::as_array);
        let rows: Vec<_> = shares.into_iter().flatten().filter_map(share).collect();
        if !rows.is_empty() {
            text += &format!("\n\n{}", table([heading, "CHUNKS", "IN", "OUT", "CPU"], &rows));
        }
    }
    text
}

/// What became of the chunks of one class, or what one stage did; `None` if that is nothing.
fn share(share: &serde_json::Value) -> Option<[String; 5]> {
    let number = |key: &str| share.get(key).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    let chunks = number("chunks");
    let name = share.get("name")?.as_str()?.to_owned();
    let cpu = format!("{:.0} ms", number("cpu_s") * 1000.0);
    let sizes = ["bytes_in", "bytes_out"].map(|key| bytes(number(key) as u64));
    let [bytes_in, bytes_out] = sizes;
    (chunks > 0.0).then(|| [name, chunks.to_string(), bytes_in, bytes_out, cpu])
}

/// A byte count for people, in the unit that fits.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let shown =
            table(["NAME", "N"], &[["a".into(), "1".into()], ["longer".into(), "2".into()]]);
        assert_eq!(shown, "NAME    N\na       1\nlonger  2");
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(
            (bytes(512), bytes(1536), bytes(5 << 30)),
            ("512 B".into(), "1.5 KiB".into(), "5.0 GiB".into())
        );
    }
}
