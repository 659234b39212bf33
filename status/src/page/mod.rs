//! The page of a cloudlet: read-only, whole without a script, for a phone and for a screen.
//!
//! It is one document: style and script are in it. The script only fetches the page again when the
//! stream of events says that something happened, and shows what is in it, so that how things look is
//! written once, here. Whatever comes from users and peers is text (`maud` escapes it), and the policy
//! of [`security_policy`] lets no other script run.

mod bits;
mod parts;

use std::sync::LazyLock;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use ring::digest::{SHA256, digest};

use crate::Snapshot;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("live.js");
/// More rows than this are not shown of anything; the API has them all.
const MOST_ROWS: usize = 500;
/// Operations that are over and still shown.
const MOST_ENDED: usize = 20;

/// The page of a cloudlet.
pub fn render(seen: &Snapshot) -> String {
    document(seen).into_string()
}

/// What the header Content-Security-Policy of the page is to say: this style, this script, and no
/// connections but to where the page came from.
pub fn security_policy() -> &'static str {
    static POLICY: LazyLock<String> = LazyLock::new(|| {
        let hash = |text: &str| {
            let digest = digest(&SHA256, text.as_bytes());
            data_encoding::BASE64.encode(digest.as_ref())
        };
        format!(
            "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; \
             img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hash(STYLE),
            hash(SCRIPT)
        )
    });
    &POLICY
}

fn document(seen: &Snapshot) -> Markup {
    let name = &seen.host.hostname;
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta name="referrer" content="no-referrer";
                title { (name) " · howdah" }
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { (name) }
                    p.muted {
                        "howdah " (seen.host.version) " · " span #live role="status" { "as it was when this page was made" }
                    }
                }
                main {
                    (parts::host(seen))
                    (parts::under_way(seen))
                    (parts::vms(seen))
                    (parts::operations(seen))
                    (parts::peers(seen))
                    (parts::bases(seen))
                }
                footer {
                    "The same for programs: " a href="/openapi.json" { "the API" } ", " a href="/metrics" { "metrics" } "."
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    }
}

#[cfg(test)]
mod tests;
