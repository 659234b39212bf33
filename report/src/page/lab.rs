//! What scenarios of the lab came to.

use maud::{Markup, html};

use super::bits::{or_dash, plural, scroll};
use crate::{run::Scenario, units::time};

/// One row a scenario, with what failed in it.
pub(super) fn section(scenarios: &[Scenario]) -> Option<Markup> {
    let failed = scenarios.iter().filter(|scenario| !scenario.passed).count();
    let said = match failed {
        0 => "All passed.".to_owned(),
        n => format!("{} did not pass.", plural(n, "scenario", "scenarios")),
    };
    let rows = html! {
        @for scenario in scenarios {
            tr {
                th scope="row" { (scenario.name) }
                td {
                    @if scenario.passed { span class="badge good" { "passed" } }
                    @else { span class="badge bad" { "failed" } }
                }
                td { (scenario.checks) }
                td { (or_dash(scenario.scenario_ms, time)) }
                td class="words" {
                    @for failure in &scenario.failures { div { (failure) } }
                }
            }
        }
    };
    (!scenarios.is_empty()).then(|| {
        html! {
            p class="lede" { (said) }
            (scroll("Scenarios", html! {
                table {
                    thead {
                        tr {
                            th scope="col" { "Scenario" }
                            th scope="col" { "Outcome" }
                            th scope="col" { "Checks" }
                            th scope="col" { "Took" }
                            th scope="col" class="left" { "What failed" }
                        }
                    }
                    tbody { (rows) }
                }
            }))
        }
    })
}
