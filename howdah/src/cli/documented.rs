//! What pages tell people to type is what can be typed.

use std::{fs, path::Path};

use clap::Parser;
use handoff::tls::Identity;

use super::Cli;

/// Pages with commands in them, below the project's root.
const PAGES: [&str; 10] = [
    "README.md",
    "docs/tutorial/first-handoff.md",
    "docs/howto/set-up-a-cloudlet.md",
    "docs/howto/networks.md",
    "docs/howto/peers.md",
    "docs/howto/operate-another-cloudlet.md",
    "docs/howto/watch.md",
    "docs/howto/handoff-failed.md",
    "docs/howto/install.md",
    "docs/reference/errors.md",
];

/// The commands of a page: indented lines behind a prompt, `$`, `a$` or `there$`. In the tutorial `a` and
/// `b` stand for `howdah --home ...`.
fn commands(page: &str) -> Vec<Vec<String>> {
    let key = Identity::generate().unwrap().key().to_string();
    let lines = page.lines().filter_map(|line| line.strip_prefix("    ")?.split_once("$ "));
    let commands = lines.filter(|(host, _)| host.trim().bytes().all(|b| b.is_ascii_lowercase()));
    let words = commands.map(|(_, line)| {
        let line = ["$(a identity)", "$(b identity)", "howdah:KEY-OF-A", "howdah:KEY-OF-B", "KEY"]
            .into_iter()
            .fold(line.to_owned(), |line, name| line.replace(name, &key));
        let line = line.strip_prefix("sudo ").unwrap_or(&line).to_owned();
        split(&line)
    });
    words
        .filter_map(|mut words| {
            let first = words.first_mut()?;
            if first == "a" || first == "b" {
                "howdah".clone_into(first);
            }
            (first == "howdah").then_some(words)
        })
        .collect()
}

/// The words of a line; double quotes hold words together.
fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (at, part) in line.split('"').enumerate() {
        if at % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}

#[test]
fn what_pages_say_can_be_typed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut seen = 0;
    for page in PAGES {
        for words in commands(&fs::read_to_string(root.join(page)).unwrap()) {
            seen += 1;
            if let Err(error) = Cli::try_parse_from(&words) {
                panic!("{page}: {}\n{error}", words.join(" "));
            }
        }
    }
    assert!(seen > 25, "{seen} commands only");
}

#[test]
fn commands_are_found() {
    let page =
        "text\n    $ howdah vm ls\n    here$ howdah run \"a b\" c\n    $ a vm ls\n    $ ls\n";
    let words: Vec<_> = commands(page).iter().map(|words| words.join("|")).collect();
    assert_eq!(words, ["howdah|vm|ls", "howdah|run|a b|c", "howdah|vm|ls"]);
}
