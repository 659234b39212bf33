//! Bounds for what comes from files: after this, numbers can be drawn and text can be shown.

use serde_json::Value;

/// No byte count, time or rate is larger. Ten thousand of them add up without overflow.
const MOST: f64 = 1e15;
/// A longer list is not drawn.
const MOST_ITEMS: usize = 10_000;
/// Longer text is cut.
const MOST_CHARS: usize = 2_000;

/// What documents of the lab and of the evaluation have beside what is shown: words and figures of
/// others, in their own units.
const NOT_SHOWN: [&str; 4] = ["peer", "figures", "compared", "hashes"];

/// What cannot be.
#[derive(Debug)]
pub(super) struct Untamed {
    /// Where.
    pub(super) at: String,
    /// Why not.
    pub(super) why: String,
}

/// Takes out what is not shown.
pub(super) fn prune(value: &mut Value) {
    let Some(fields) = value.as_object_mut() else { return };
    // A handoff's report has a peer too: where it went.
    fields.retain(|key, field| !NOT_SHOWN.contains(&key.as_str()) || field.is_string());
}

/// Makes a document's text harmless, and refuses its numbers and lists if they are absurd. How deep
/// it is, the parser has bounded.
pub(super) fn value(value: &mut Value) -> Result<(), Untamed> {
    walk(value, &mut Vec::new())
}

/// Text without what could mislead a reader or upset a parser: control characters, and those that
/// turn the direction of writing.
pub(super) fn text(text: &str) -> String {
    let mut tame: String = text.chars().take(MOST_CHARS).map(shown).collect();
    if text.chars().nth(MOST_CHARS).is_some() {
        tame.push('…');
    }
    tame
}

fn shown(c: char) -> char {
    match c {
        '\n' | '\t' => ' ',
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        // Not characters at all.
        '\u{fdd0}'..='\u{fdef}' => '\u{fffd}',
        c if u32::from(c) & 0xfffe == 0xfffe => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

fn walk(value: &mut Value, at: &mut Vec<String>) -> Result<(), Untamed> {
    let refuse = |why: String| Err(Untamed { at: at.join("."), why });
    match value {
        Value::Null | Value::Bool(_) => Ok(()),
        Value::Number(number) => match number.as_f64() {
            Some(n) if (0.0..=MOST).contains(&n) => Ok(()),
            _ => refuse(format!("{number} is not between 0 and {MOST:e}")),
        },
        Value::String(string) => {
            *string = text(string);
            Ok(())
        }
        Value::Array(items) if items.len() > MOST_ITEMS => {
            refuse(format!("{} items, at most {MOST_ITEMS} can be shown", items.len()))
        }
        Value::Array(items) => items.iter_mut().enumerate().try_for_each(|(n, item)| {
            at.push(n.to_string());
            walk(item, at)?;
            at.pop();
            Ok(())
        }),
        Value::Object(fields) => {
            for (key, mut field) in std::mem::take(fields) {
                let key = text(&key);
                at.push(key);
                walk(&mut field, at)?;
                fields.insert(at.pop().unwrap_or_default(), field);
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn text_is_made_harmless_and_short() {
        assert_eq!(text("a\0b\u{202e}c\nd\u{1b}[2J"), "a\u{fffd}b\u{fffd}c d\u{fffd}[2J");
        let long = text(&"é".repeat(MOST_CHARS + 1));
        assert_eq!((long.chars().count(), long.ends_with('…')), (MOST_CHARS + 1, true));
    }

    #[test]
    fn absurd_numbers_are_refused_with_their_place() {
        for bad in [json!(-1), json!(1e16), json!(-0.5), json!(u64::MAX)] {
            let mut document = json!({ "a": [1, { "b\u{7}": bad }] });
            let refused = value(&mut document).unwrap_err();
            assert_eq!(refused.at, "a.1.b\u{fffd}");
        }
        let mut fine = json!({ "a": [0, 1.5, 1e15, null, true, "x"] });
        value(&mut fine).unwrap();
        assert_eq!(fine, json!({ "a": [0, 1.5, 1e15, null, true, "x"] }));
    }

    #[test]
    fn long_lists_are_refused() {
        assert!(value(&mut json!(vec![0; MOST_ITEMS])).is_ok());
        assert!(value(&mut json!(vec![0; MOST_ITEMS + 1])).unwrap_err().why.contains("10001"));
    }
}
