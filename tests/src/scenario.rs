//! Scenarios: what a file under `tests/scenarios/` may say.
//!
//! Every field is documented in `docs/lab.md`. A field that is not known is an error that names
//! it, so that a typing mistake cannot quietly switch a check off.

mod application;
mod limits;

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

pub(crate) use self::{
    application::ApplicationPlan,
    limits::{Figure, FigureLimit, LegLimits, Limits, Ratio},
};

/// Longest name: it becomes a directory name and a column of a table.
const MAX_NAME_BYTES: usize = 48;

/// One scenario.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// Unique among the scenarios of one run.
    pub(crate) name: String,
    /// What it shows, for people.
    pub(crate) description: String,
    /// The link between the cloudlets.
    #[serde(default)]
    pub(crate) link: LinkPlan,
    /// The guest.
    #[serde(default)]
    pub(crate) vm: VmPlan,
    /// Cloudlet B where it differs from A.
    #[serde(default)]
    pub(crate) cloudlet_b: CloudletPlan,
    /// The client that talks to the guest throughout.
    #[serde(default)]
    pub(crate) client: ClientPlan,
    /// What happens, in order.
    pub(crate) steps: Vec<Step>,
    /// Where the guest must run at the end.
    pub(crate) ends_on: Place,
    /// Figures that must be kept to.
    #[serde(default)]
    pub(crate) limits: Limits,
}

/// How the link between the cloudlets is shaped: the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Link {
    /// Rate of each direction; 0 for no limit.
    pub(crate) rate_mbps: f64,
    /// Delay of each direction: half of what it adds to a round trip.
    pub(crate) delay_ms: f64,
    /// Packets lost at random, each direction.
    pub(crate) loss_percent: f64,
}

impl Default for Link {
    fn default() -> Self {
        Self { rate_mbps: 10.0, delay_ms: 0.0, loss_percent: 0.0 }
    }
}

/// The link and how it changes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LinkPlan {
    /// See [`Link::rate_mbps`].
    pub(crate) rate_mbps: Option<f64>,
    /// See [`Link::delay_ms`].
    pub(crate) delay_ms: f64,
    /// See [`Link::loss_percent`].
    pub(crate) loss_percent: f64,
    /// Changes over time.
    pub(crate) changes: Vec<LinkChange>,
}

impl LinkPlan {
    /// The link at the beginning.
    pub(crate) fn at_first(&self) -> Link {
        Link {
            rate_mbps: self.rate_mbps.unwrap_or(Link::default().rate_mbps),
            delay_ms: self.delay_ms,
            loss_percent: self.loss_percent,
        }
    }
}

/// A change of the link; what is not named stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LinkChange {
    /// When, in seconds from the start of the first handoff.
    pub(crate) at_s: f64,
    /// New rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate_mbps: Option<f64>,
    /// New delay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) delay_ms: Option<f64>,
    /// New loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) loss_percent: Option<f64>,
}

impl LinkChange {
    /// The link after the change.
    pub(crate) fn apply(&self, link: Link) -> Link {
        Link {
            rate_mbps: self.rate_mbps.unwrap_or(link.rate_mbps),
            delay_ms: self.delay_ms.unwrap_or(link.delay_ms),
            loss_percent: self.loss_percent.unwrap_or(link.loss_percent),
        }
    }
}

/// The guest.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct VmPlan {
    /// Name of a directory under `target/images`.
    pub(crate) image: String,
    /// Its RAM.
    pub(crate) memory_mib: u32,
    /// Its virtual CPUs.
    pub(crate) vcpus: u8,
    /// Appended to its kernel command line.
    pub(crate) append: String,
    /// Whether its base holds memory, so that it goes on from where the base's guest was ready.
    pub(crate) base_memory: bool,
}

impl Default for VmPlan {
    fn default() -> Self {
        Self {
            image: "minimal".into(),
            memory_mib: 512,
            vcpus: 1,
            append: String::new(),
            base_memory: false,
        }
    }
}

/// A cloudlet.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CloudletPlan {
    /// Whether it holds the guest's base.
    pub(crate) has_base: bool,
    /// Room on its file system beside the base; no limit when absent.
    pub(crate) free_mib: Option<u32>,
}

impl Default for CloudletPlan {
    fn default() -> Self {
        Self { has_base: true, free_mib: None }
    }
}

/// The client outside.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ClientPlan {
    /// Time between two probes.
    pub(crate) interval_ms: u32,
}

impl Default for ClientPlan {
    fn default() -> Self {
        Self { interval_ms: 10 }
    }
}

/// One of the two cloudlets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Side {
    /// Where guests start.
    A,
    /// The other.
    B,
}

/// Where a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Place {
    /// On cloudlet A.
    A,
    /// On cloudlet B.
    B,
    /// Nowhere: it died with its cloudlet.
    None,
}

impl Place {
    /// The cloudlet, if it is one.
    pub(crate) fn side(self) -> Option<Side> {
        match self {
            Self::A => Some(Side::A),
            Self::B => Some(Side::B),
            Self::None => None,
        }
    }
}

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Step {
    /// Start the guest on A and wait until its agent answers.
    Start {},
    /// Let time pass.
    Wait {
        /// How much.
        seconds: f64,
    },
    /// Tell the guest's agent to do something; its answer must not be an error.
    Agent {
        /// The command line, as the agent documents it.
        command: String,
    },
    /// Ask the guest's agent again and again, until a number of its answer is large enough.
    Await {
        /// The command line.
        command: String,
        /// The number's name in the answer.
        field: String,
        /// How large it must be.
        at_least: f64,
        /// How long that may take.
        within_s: f64,
    },
    /// Ask the guest's agent several times and keep numbers of its answers.
    Measure {
        /// What the figures are called: `NAME.FIELD`.
        name: String,
        /// The command line.
        command: String,
        /// The numbers' names in the answers.
        fields: Vec<String>,
        /// How often.
        times: u32,
    },
    /// Start an application in the guest and its client outside, which asks it until the end.
    Application(ApplicationPlan),
    /// Record what the guest on A changes: `NAME.trace` in the scenario's directory.
    Record {
        /// What the trace is called.
        name: String,
        /// For how long.
        for_s: u64,
        /// How often to look at what changed.
        #[serde(default = "every_100_ms")]
        every_ms: u64,
    },
    /// Note what memory and files the cloudlets take: figures `NAME.vm_kib`, `NAME.listener_kib`,
    /// `NAME.descriptors`, `NAME.files_kib`.
    Sizes {
        /// What the figures are called.
        name: String,
    },
    /// Do some steps several times.
    Repeat {
        /// How often.
        times: u32,
        /// What.
        steps: Vec<Step>,
    },
    /// Hand the guest off.
    Handoff {
        /// From where.
        from: Side,
        /// To where.
        to: Side,
        /// Whether both sides hash all of RAM and disk at cutover.
        #[serde(default)]
        audit: bool,
        /// How it must end.
        #[serde(default)]
        expect: Expect,
        /// Text that the error must hold, when the guest is to be kept.
        #[serde(default)]
        says: Option<String>,
        /// Go on with the next step at once; a later `finish` waits for the end.
        #[serde(default)]
        background: bool,
        /// Who listens at the other cloudlet.
        #[serde(default)]
        peer: Peer,
        /// What howdah is to leave out, as `--without` takes it.
        #[serde(default)]
        without: Vec<String>,
        /// How howdah is to encode what changed a little, as `--delta` takes it.
        #[serde(default)]
        delta: Option<String>,
        /// More of howdah's flags.
        #[serde(default)]
        flags: Vec<String>,
        /// Whether an offline encoder shows what it makes of the state that arrived.
        #[serde(default)]
        encode: bool,
        /// How long it may take before it counts as one that hangs; three minutes unless said.
        #[serde(default)]
        within_s: Option<f64>,
        /// What the handoff may cost.
        #[serde(default)]
        limits: LegLimits,
    },
    /// Pause the guest where the last handoff brought it, and let the offline encoder look at it: what
    /// `encode` does, later, so that those who watch the guest meet the handoff alone.
    Encode {},
    /// Give up the handoff in the background.
    Cancel {},
    /// Wait for the end of a handoff in the background.
    Finish {},
    /// Kill, by SIGKILL, every process of howdah on a cloudlet.
    Kill {
        /// The cloudlet.
        who: Side,
        /// Only once this much has gone over the link since the handoff began.
        #[serde(default)]
        after_link_kib: u64,
    },
    /// Lose every packet on the link.
    Cut {},
    /// End the cut.
    Heal {},
    /// Shape the link anew.
    Link {
        /// The link from now on; a field that is absent has its default.
        now: Link,
    },
    /// Start the cloudlet's `howdah receive` again.
    Receive {
        /// The cloudlet.
        on: Side,
    },
}

fn every_100_ms() -> u64 {
    100
}

/// The most steps that a scenario may have, repetitions counted.
const MAX_STEPS: usize = 10_000;

/// Puts what is repeated one after the other.
fn unrolled(steps: Vec<Step>) -> Result<Vec<Step>> {
    let mut all = Vec::new();
    for step in steps {
        match step {
            Step::Repeat { times, steps } => {
                let once = unrolled(steps)?;
                for _ in 0..times {
                    all.extend(once.iter().cloned());
                    if all.len() > MAX_STEPS {
                        bail!("steps: more than {MAX_STEPS}, repetitions counted");
                    }
                }
            }
            step => all.push(step),
        }
    }
    Ok(all)
}

/// How a handoff must end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Expect {
    /// The guest runs at the other cloudlet.
    #[default]
    Moved,
    /// The handoff failed and the guest goes on where it was.
    Kept,
    /// The source was killed.
    Killed,
}

/// Who listens at the other cloudlet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Peer {
    /// `howdah receive`.
    #[default]
    Howdah,
    /// Something that speaks a later version of the protocol only.
    OtherVersion,
}

impl Scenario {
    /// Reads a file.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the scenario {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{}", path.display()))
    }

    /// Reads the text of a file.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut scenario: Self = toml::from_str(text)?;
        scenario.steps = unrolled(scenario.steps)?;
        scenario.validate()?;
        Ok(scenario)
    }

    /// The application that somebody uses, if there is one.
    pub(crate) fn application(&self) -> Option<&ApplicationPlan> {
        self.steps.iter().find_map(|step| match step {
            Step::Application(plan) => Some(plan),
            _ => None,
        })
    }

    /// The limits of each handoff, in order.
    pub(crate) fn leg_limits(&self) -> impl Iterator<Item = &LegLimits> {
        self.steps.iter().filter_map(|step| match step {
            Step::Handoff { limits, .. } => Some(limits),
            _ => None,
        })
    }

    /// What the offline encoder needs.
    fn check_encoded(&self) -> Result<()> {
        for step in &self.steps {
            if *step == (Step::Encode {}) && !self.vm.base_memory {
                bail!("a step encode needs [vm] base_memory = true: it reads RAM as a map of that");
            }
            let Step::Handoff { encode, limits, .. } = step else { continue };
            if *encode && !self.vm.base_memory {
                bail!("encode = true needs [vm] base_memory = true: it reads RAM as a map of that");
            }
            if limits.encoder_ratio.is_some() && !encode {
                bail!("encoder_ratio needs encode = true in the same handoff");
            }
        }
        Ok(())
    }

    fn validate(&self) -> Result<()> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let name = self.name.as_bytes();
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.iter().all(|byte| plain(*byte)) {
            bail!(
                "name = {:?}: use 1 to {MAX_NAME_BYTES} lowercase letters, digits and hyphens",
                self.name
            );
        }
        if !matches!(self.steps.first(), Some(Step::Start {})) {
            bail!("steps: the first must be {{ do = \"start\" }}");
        }
        let applications = |step: &&Step| matches!(step, Step::Application(_));
        if self.steps.iter().filter(applications).count() > 1 {
            bail!("steps: a second application: one client asks one");
        }
        let mut pending = false;
        for (at, step) in self.steps.iter().enumerate() {
            let at = at + 1;
            match step {
                Step::Start {} if at > 1 => bail!("steps: step {at} starts a second guest"),
                Step::Handoff { .. } if pending => {
                    bail!("steps: step {at} hands off while a handoff runs: finish it first")
                }
                Step::Handoff { from, to, .. } if from == to => {
                    bail!("steps: step {at} hands off to where the guest is")
                }
                Step::Handoff { within_s: Some(within_s), .. }
                    if !(1.0..=7200.0).contains(within_s) =>
                {
                    bail!("steps: step {at} hands off within {within_s} s: use 1 to 7200")
                }
                Step::Handoff { background, .. } => pending = *background,
                Step::Cancel {} if !pending => {
                    bail!("steps: step {at} gives up a handoff and none is in the background")
                }
                Step::Finish {} if !pending => {
                    bail!("steps: step {at} finishes a handoff and none is in the background")
                }
                Step::Finish {} => pending = false,
                Step::Wait { seconds } if !(0.0..=3600.0).contains(seconds) => {
                    bail!("steps: step {at} waits {seconds} s: use 0 to 3600")
                }
                Step::Await { within_s, .. } if !(0.0..=3600.0).contains(within_s) => {
                    bail!("steps: step {at} waits for {within_s} s: use 0 to 3600")
                }
                Step::Measure { times, fields, .. } if *times == 0 || fields.is_empty() => {
                    bail!("steps: step {at} measures nothing")
                }
                Step::Application(plan) => plan.validate().with_context(|| format!("step {at}"))?,
                Step::Link { now } => check_link(now)?,
                _ => {}
            }
        }
        if pending {
            bail!("steps: a handoff in the background is never finished");
        }
        self.limits.validate()?;
        self.check_encoded()?;
        for (at, limits) in self.leg_limits().enumerate() {
            limits.validate().with_context(|| format!("limits of handoff {}", at + 1))?;
        }
        let mut link = self.link.at_first();
        check_link(&link)?;
        for change in &self.link.changes {
            link = change.apply(link);
            check_link(&link)?;
        }
        Ok(())
    }
}

fn check_link(link: &Link) -> Result<()> {
    if !(0.0..=100_000.0).contains(&link.rate_mbps) {
        bail!("link: rate_mbps = {}: use 0 (no limit) to 100000", link.rate_mbps);
    }
    if !(0.0..=10_000.0).contains(&link.delay_ms) {
        bail!("link: delay_ms = {}: use 0 to 10000", link.delay_ms);
    }
    if !(0.0..=100.0).contains(&link.loss_percent) {
        bail!("link: loss_percent = {}: use 0 to 100", link.loss_percent);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "name = 'x'\ndescription = 'd'\nends_on = 'a'\n";

    fn error_of(text: &str) -> String {
        format!("{:#}", Scenario::parse(text).unwrap_err())
    }

    fn with_steps(steps: &str) -> String {
        format!("{SMALLEST}steps = [{{ do = 'start' }}, {steps}]\n")
    }

    #[test]
    fn what_is_left_out_has_sensible_values() {
        let scenario = Scenario::parse(&with_steps("")).unwrap();
        assert_eq!(scenario.link.at_first(), Link::default());
        assert_eq!((scenario.vm.memory_mib, scenario.vm.vcpus), (512, 1));
        assert_eq!(scenario.steps, [Step::Start {}]);
        assert!(scenario.cloudlet_b.has_base);
    }

    #[test]
    fn unknown_fields_are_named() {
        let typo = format!("{}[limits]\ndown_time_ms = 5\n", with_steps(""));
        assert!(error_of(&typo).contains("down_time_ms"), "{}", error_of(&typo));
        let step = with_steps("{ do = 'handoff', from = 'a', to = 'b', audits = true }");
        assert!(error_of(&step).contains("audits"), "{}", error_of(&step));
        let verb = with_steps("{ do = 'fly' }");
        assert!(error_of(&verb).contains("fly"), "{}", error_of(&verb));
        let start = format!("{SMALLEST}steps = [{{ do = 'start', on = 'a' }}]\n");
        assert!(error_of(&start).contains("on"), "{}", error_of(&start));
    }

    #[test]
    fn steps_that_make_no_sense_are_refused() {
        for (steps, word) in [
            ("{ do = 'finish' }", "none is in the background"),
            ("{ do = 'cancel' }", "none is in the background"),
            ("{ do = 'start' }", "second guest"),
            ("{ do = 'handoff', from = 'a', to = 'a' }", "where the guest is"),
            ("{ do = 'handoff', from = 'a', to = 'b', background = true }", "never finished"),
            ("{ do = 'wait', seconds = -1.0 }", "waits"),
            ("{ do = 'handoff', from = 'a', to = 'b', encode = true }", "base_memory"),
            ("{ do = 'encode' }", "base_memory"),
            (
                "{ do = 'handoff', from = 'a', to = 'b', limits = { encoder_ratio = 1.1 } }",
                "encode = true",
            ),
            (
                "{ do = 'handoff', from = 'a', to = 'b', limits = { ratios = [{ of = 'bytes', leg = 0 }] } }",
                "numbered from 1",
            ),
            ("{ do = 'measure', name = 'n', command = 'c', fields = [], times = 1 }", "nothing"),
        ] {
            let error = error_of(&with_steps(steps));
            assert!(error.contains(word), "{steps}: {error}");
        }
    }

    #[test]
    fn what_is_repeated_comes_one_after_the_other() {
        let there = "{ do = 'wait', seconds = 1 }";
        let inner = format!("{{ do = 'repeat', times = 2, steps = [{there}] }}");
        let outer = format!("{{ do = 'repeat', times = 3, steps = [{inner}, {there}] }}");
        let scenario = Scenario::parse(&with_steps(&outer)).unwrap();
        assert_eq!(scenario.steps.len(), 1 + 3 * 3);
        assert!(error_of(&with_steps(&inner.replace("= 2", "= 20000"))).contains("more than"));
        let start = "{ do = 'repeat', times = 1, steps = [{ do = 'start' }] }";
        assert!(error_of(&with_steps(start)).contains("second guest"));
    }

    #[test]
    fn changes_of_the_link_leave_the_rest_as_it_was() {
        let text = format!(
            "{}[link]\nrate_mbps = 5\ndelay_ms = 25\nchanges = [{{ at_s = 3, rate_mbps = 35 }}]\n",
            with_steps("")
        );
        let plan = Scenario::parse(&text).unwrap().link;
        let changed = plan.changes[0].apply(plan.at_first());
        assert_eq!(changed, Link { rate_mbps: 35.0, delay_ms: 25.0, loss_percent: 0.0 });
    }

    #[test]
    fn every_scenario_of_the_project_parses() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut pending = vec![dir];
        let mut names = Vec::new();
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    pending.push(path);
                } else if path.extension().is_some_and(|suffix| suffix == "toml") {
                    // Those of one directory run together.
                    names.push((dir.clone(), Scenario::load(&path).unwrap().name));
                }
            }
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!((names.len(), count >= 11), (count, true), "{names:?}");
    }
}
