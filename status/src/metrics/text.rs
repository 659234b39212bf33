//! Prometheus' text format, version 0.0.4.

use std::fmt::{Display, Write};

use crate::Histogram;

/// What the text is, for the header Content-Type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Writes families, one after the other.
#[derive(Debug, Default)]
pub(super) struct Text(String);

impl Text {
    pub(super) fn into_string(self) -> String {
        self.0
    }

    /// Begins a family of values that go up and down.
    pub(super) fn gauge<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        self.family(name, "gauge", help)
    }

    /// Begins a family of values that only grow, and begin again with a process.
    pub(super) fn counter<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        debug_assert!(name.ends_with("_total"), "{name}");
        self.family(name, "counter", help)
    }

    fn family<'a>(&'a mut self, name: &'a str, kind: &str, help: &str) -> Family<'a> {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Family { text: &mut self.0, name }
    }

    pub(super) fn histogram(&mut self, name: &str, help: &str, values: &Histogram) {
        let _family = self.family(name, "histogram", help);
        let mut up_to = 0;
        let bounds = values.bounds.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&values.counts) {
            up_to += count;
            let _ = writeln!(self.0, "{name}_bucket{{le=\"{bound}\"}} {up_to}");
        }
        let _ = writeln!(self.0, "{name}_sum {}\n{name}_count {up_to}", values.sum);
    }
}

/// A family that is being written.
pub(super) struct Family<'a> {
    text: &'a mut String,
    name: &'a str,
}

impl Family<'_> {
    /// A series of the family, with its labels.
    pub(super) fn with(&mut self, labels: &[(&str, &str)], value: impl Display) -> &mut Self {
        let _ = write!(self.text, "{}", self.name);
        for (at, (name, value)) in labels.iter().enumerate() {
            let open = if at == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{open}{name}=\"{}\"", escape(value));
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{close} {value}");
        self
    }

    /// The one series of a family without labels.
    pub(super) fn is(&mut self, value: impl Display) {
        self.with(&[], value);
    }
}

/// A label's value may hold what a peer or a user wrote.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
