//! One migration between two QEMUs, as a management tool does it: disk first, then memory, then both at
//! the switch.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::{
    disk::{self, Mirrored},
    qmp::{Event, Qmp, QmpError, Timestamp},
    variant::Variant,
};
use crate::scenario::Side;

/// The target's port of the migration.
const PORT: u16 = 4444;
/// How long the target may take to run once the source has handed all over.
const TAKES_OVER: Duration = Duration::from_secs(60);
/// How long a migration that was given up may take to be over.
const GIVES_UP: Duration = Duration::from_secs(20);
/// The longest stop that QEMU plans for at first: its own default.
const FIRST_LIMIT_MS: u64 = 300;
/// The longest that it is ever let plan for.
const LAST_LIMIT_MS: u64 = 8000;
/// How long pre-copy may try before it is let stop the guest for longer.
const RAISES: Duration = Duration::from_secs(5);
/// How often a QEMU that says nothing is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Two QEMUs and what is to happen between them.
pub(super) struct Migration<'a> {
    /// Where the guest runs.
    pub(super) source: &'a mut Qmp,
    /// Where it is to run.
    pub(super) target: &'a mut Qmp,
    /// How.
    pub(super) variant: Variant,
    /// When it is given up.
    pub(super) bound: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Ended {
    /// The guest runs at the target, and nothing of it is needed at the source.
    pub(super) finished: bool,
    /// Until then.
    pub(super) total_ms: Option<f64>,
    /// From the source's last instruction of the guest to the target's first.
    pub(super) downtime_ms: Option<f64>,
    /// What it was doing when it was given up.
    pub(super) given_up: Option<String>,
    /// QEMU's own figures.
    pub(super) figures: Value,
}

/// How memory's way ended.
#[derive(Debug)]
enum Course {
    Completed,
    TooLate,
    Failed(String),
}

impl Migration<'_> {
    /// Carries it out.
    pub(super) fn run(mut self) -> Result<Ended> {
        self.prepare().context("preparing the migration")?;
        let (began, started) = (now()?, Instant::now());
        let deadline = started + self.bound;
        let address = Side::B.address();
        disk::export(self.target, address)?;
        disk::mirror(self.source, address)?;
        let mirrored =
            disk::wait_mirrored(self.source, deadline).context("the mirror of the disk")?;
        if mirrored == Mirrored::TooLate {
            let job = disk::progress(self.source);
            let figures = json!({ "mirror": job });
            let given_up = Some("mirroring the disk".to_owned());
            return Ok(Ended { given_up, figures, ..Ended::default() });
        }
        let mirror_ms = started.elapsed().as_secs_f64() * 1e3;
        let uri = format!("tcp:{address}:{PORT}");
        self.target.tell("migrate-incoming", json!({ "uri": uri }))?;
        self.source.tell("migrate", json!({ "uri": uri }))?;
        let course = self.follow(deadline).context("the migration")?;
        let mut figures = self.source.query("query-migrate")?;
        if let Some(figures) = figures.as_object_mut() {
            figures.insert("mirror-ms".into(), json!(mirror_ms));
        }
        match course {
            Course::Failed(problem) => bail!("QEMU's migration failed: {problem}"),
            Course::TooLate => Ok(self.give_up(figures)),
            Course::Completed => {
                let over = self.wait_taken_over().context("the target")?;
                let stopped = self.source.last("STOP").context("the source never stopped")?;
                let runs = self.target.last("RESUME").context("the target never ran")?;
                Ok(Ended {
                    finished: true,
                    total_ms: Some(over.ms_since(began)),
                    downtime_ms: Some(runs.ms_since(stopped)),
                    given_up: None,
                    figures,
                })
            }
        }
    }

    fn prepare(&mut self) -> Result<(), QmpError> {
        for qmp in [&mut *self.source, &mut *self.target] {
            qmp.tell("migrate-set-capabilities", self.variant.capabilities())?;
            if let Some(parameters) = self.variant.parameters() {
                qmp.tell("migrate-set-parameters", parameters)?;
            }
        }
        Ok(())
    }

    /// Follows the source until memory is over there, and does what is to be done on the way.
    fn follow(&mut self, deadline: Instant) -> Result<Course, QmpError> {
        let mut limit = Limit::default();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Course::TooLate);
            }
            let Some(event) = self.source.event(left.min(LOOK))? else {
                // The source does not tell of a target that has died before TCP gives up.
                self.target.check()?;
                continue;
            };
            let data = |name: &str| event.data.get(name);
            let status = data("status").and_then(Value::as_str).unwrap_or_default();
            match (event.event.as_str(), status) {
                ("MIGRATION", "pre-switchover") => {
                    disk::finish(self.source, self.target)?;
                    let state = json!({ "state": "pre-switchover" });
                    self.source.tell("migrate-continue", state)?;
                }
                ("MIGRATION", "completed") => return Ok(Course::Completed),
                ("MIGRATION", "failed" | "cancelled") => {
                    let why = self.source.query("query-migrate")?;
                    let why = why.get("error-desc").and_then(Value::as_str).map(str::to_owned);
                    return Ok(Course::Failed(why.unwrap_or_else(|| status.to_owned())));
                }
                ("MIGRATION_PASS", _) => {
                    let pass = data("pass").and_then(Value::as_i64).unwrap_or(0);
                    self.after_pass(pass, &mut limit)?;
                }
                ("BLOCK_JOB_ERROR" | "SHUTDOWN" | "GUEST_PANICKED", _) => {
                    return Ok(Course::Failed(format!("{} {}", event.event, event.data)));
                }
                _ => {}
            }
        }
    }

    /// All of memory has been sent once when the second pass begins. With post-copy the guest can run at
    /// the target then; pre-copy goes on, and may stop the guest for longer if that comes to nothing.
    fn after_pass(&mut self, pass: i64, limit: &mut Limit) -> Result<(), QmpError> {
        let told = match (self.variant, pass) {
            (Variant::Postcopy, 2) => self.source.tell("migrate-start-postcopy", json!({})),
            (Variant::Postcopy, _) => return Ok(()),
            _ => match limit.after_pass(pass, Instant::now()) {
                Some(ms) => {
                    self.source.tell("migrate-set-parameters", json!({ "downtime-limit": ms }))
                }
                None => return Ok(()),
            },
        };
        match told {
            // So little was left that it is over already.
            Err(QmpError::Refused { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until the target runs the guest and has all of it; when that was, or when the source had
    /// nothing more to give, if that was later.
    fn wait_taken_over(&mut self) -> Result<Timestamp, QmpError> {
        let completed = |event: &Event| {
            let status = event.data.get("status").and_then(Value::as_str);
            event.event == "MIGRATION" && status == Some("completed")
        };
        let (mut runs, mut has_all) = (None, None);
        while runs.is_none() || has_all.is_none() {
            let event = self.target.wait_for("sign of the guest", TAKES_OVER, |event| {
                event.event == "RESUME" || completed(event)
            })?;
            if event.event == "RESUME" {
                runs = Some(event.timestamp);
            } else {
                has_all = Some(event.timestamp);
            }
        }
        let source = self.source.last("MIGRATION");
        Ok([runs, has_all, source].into_iter().flatten().max().unwrap_or_default())
    }

    /// Gives up what has not converged; the guest goes on at the source, if it still can.
    fn give_up(&mut self, figures: Value) -> Ended {
        let status = figures.get("status").and_then(Value::as_str).unwrap_or("unknown").to_owned();
        // A failure to cancel changes nothing of what is known: the run has not finished.
        let _ = self.source.tell("migrate_cancel", json!({}));
        let _ = self.source.wait_for("end of the migration", GIVES_UP, |event| {
            let status = event.data.get("status").and_then(Value::as_str);
            event.event == "MIGRATION" && status == Some("cancelled")
        });
        Ended { given_up: Some(format!("memory: {status}")), figures, ..Ended::default() }
    }
}

/// For how long pre-copy may plan to stop the guest. Its default never ends a guest whose working set
/// takes longer than that on a thin link; management tools raise it step by step, and so is done here.
#[derive(Debug)]
struct Limit {
    ms: u64,
    since: Option<Instant>,
}

impl Default for Limit {
    fn default() -> Self {
        Self { ms: FIRST_LIMIT_MS, since: None }
    }
}

impl Limit {
    /// The new limit, if a pass that begins now is one too many.
    fn after_pass(&mut self, pass: i64, now: Instant) -> Option<u64> {
        // The first passes over all of memory are no attempt yet.
        let since = *self.since.get_or_insert(now);
        if pass <= 2 {
            self.since = Some(now);
            return None;
        }
        if now.duration_since(since) < RAISES || self.ms >= LAST_LIMIT_MS {
            return None;
        }
        self.since = Some(now);
        self.ms = (self.ms * 3 / 2).min(LAST_LIMIT_MS);
        Some(self.ms)
    }
}

/// CLOCK_REALTIME, which QEMU stamps its events with.
fn now() -> Result<Timestamp> {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).context("no clock")?;
    Ok(Timestamp { seconds: now.tv_sec(), microseconds: now.tv_nsec() / 1000 })
}

#[cfg(test)]
mod tests;
