//! Pieces that several parts are made of.

use howdah_api::{State, VmState};
use maud::{Markup, html};

use super::MOST_ROWS;

/// A table with its heading; a card that says so where there is nothing.
pub(super) fn table(
    title: &str,
    columns: &[(&str, bool)],
    rows: Vec<Markup>,
    nothing: &str,
) -> Markup {
    let left_out = rows.len().saturating_sub(MOST_ROWS);
    html! {
        h2 { (title) }
        div.card {
            @if rows.is_empty() {
                p.muted { (nothing) }
            } @else {
                table {
                    thead { tr {
                        @for (column, left) in columns {
                            th scope="col" class=[left.then_some("left")] { (column) }
                        }
                    } }
                    tbody { @for row in rows.into_iter().take(MOST_ROWS) { tr { (row) } } }
                }
                @if left_out > 0 { p.muted { "and " (left_out) " more" } }
            }
        }
    }
}

/// A cell that says, where columns have no heads, what it is.
pub(super) fn cell(is: &str, left: bool, content: &Markup) -> Markup {
    html! { td data-is=(is) class=[left.then_some("left")] { span { (content) } } }
}

/// What a VM does, coloured by whether somebody should look.
pub(super) fn vm_state(state: VmState) -> Markup {
    let class = match state {
        VmState::Running | VmState::Recording => "good",
        VmState::HandingOff | VmState::Receiving | VmState::Interrupted | VmState::Prepared => {
            "flag"
        }
        VmState::InDoubt | VmState::NotAnswering | VmState::Damaged => "bad",
        _ => "",
    };
    html! { span.badge.(class) { (state.name()) } }
}

/// How an operation stands.
pub(super) fn operation_state(state: State) -> Markup {
    let class = match state {
        State::Running => "flag",
        State::Done => "good",
        State::Failed => "bad",
        State::Cancelled => "",
    };
    html! { span.badge.(class) { (state.name()) } }
}

/// The first digits of an id: enough for people.
pub(super) fn short(id: &str) -> &str {
    id.char_indices().nth(12).map_or(id, |(at, _)| id.get(..at).unwrap_or(id))
}
