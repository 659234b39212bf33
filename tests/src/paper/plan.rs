//! What the evaluation runs: applications, links, systems, and the tables made of them.
//!
//! The plan is a file, `tests/paper.toml`. A field that is not known is an error, as in scenarios. A
//! run that two tables ask for is run once.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::scenario::{Link, LinkChange, LinkPlan, Step};

/// Longest part of a run's name: four of them and a number become a file's name.
const MAX_NAME_BYTES: usize = 32;
/// No run is given more time than this: a day's evaluation must end.
const MAX_BOUND_S: f64 = 7200.0;

/// The file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// How often each run is made.
    repetitions: u32,
    /// When a run that has not finished is given up.
    bound_s: f64,
    /// What differs when there is little time.
    quick: Quick,
    /// What guests do.
    applications: Vec<Application>,
    /// The links.
    links: Vec<NamedLink>,
    /// What is run.
    tables: Vec<Table>,
}

/// The plan for those in a hurry: only tables with a part for it.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Quick {
    repetitions: u32,
    bound_s: f64,
}

/// A guest and what it does.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Application {
    /// Its name.
    pub(crate) name: String,
    /// The image: a directory under `target/images`.
    pub(crate) image: String,
    /// RAM of the guest.
    pub(crate) memory_mib: u32,
    /// Its virtual CPUs.
    pub(crate) vcpus: u8,
    /// Time between two probes of the client that watches it. Each one changes some pages of the guest:
    /// a hundred a second are more than 10 Mbps can follow.
    #[serde(default = "twenty_a_second")]
    pub(crate) probe_ms: u32,
    /// What happens between the guest's start and the move: steps `agent`, `await`, `wait` and
    /// `application`.
    #[serde(default)]
    pub(crate) before: Vec<Step>,
}

fn twenty_a_second() -> u32 {
    50
}

/// A link with a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NamedLink {
    /// Its name.
    pub(crate) name: String,
    /// Rate of each direction; 0 for no limit.
    pub(crate) rate_mbps: f64,
    /// Delay of each direction.
    #[serde(default)]
    pub(crate) delay_ms: f64,
    /// Packets lost at random, each direction.
    #[serde(default)]
    pub(crate) loss_percent: f64,
    /// Changes, counted from when the move is asked for.
    #[serde(default)]
    pub(crate) changes: Vec<LinkChange>,
}

impl NamedLink {
    /// As scenarios have it.
    pub(crate) fn plan(&self) -> LinkPlan {
        LinkPlan {
            rate_mbps: Some(self.rate_mbps),
            delay_ms: self.delay_ms,
            loss_percent: self.loss_percent,
            changes: self.changes.clone(),
        }
    }

    /// The link at the beginning.
    pub(crate) fn at_first(&self) -> Link {
        self.plan().at_first()
    }
}

/// What moves a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum System {
    /// This project.
    Howdah,
    /// QEMU's live migration, with a mirror of the disk.
    Qemu,
}

impl System {
    /// As files have it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Howdah => "howdah",
            Self::Qemu => "qemu",
        }
    }
}

/// A system and how it is used, written `SYSTEM/HOW`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Variant {
    /// What moves the guest.
    pub(crate) system: System,
    /// How.
    pub(crate) name: String,
}

impl TryFrom<String> for Variant {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let known = [System::Howdah, System::Qemu];
        let parts = text.split_once('/').and_then(|(system, name)| {
            let system = known.into_iter().find(|known| known.name() == system)?;
            Some(Self { system, name: name.to_owned() })
        });
        parts.ok_or_else(|| format!("variant {text:?}: use howdah/HOW or qemu/HOW"))
    }
}

/// Runs that belong together: every application over every link with every variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    /// What people ask for it by.
    name: String,
    applications: Vec<String>,
    links: Vec<String>,
    variants: Vec<Variant>,
    /// The part of it that is run in a hurry; without it, none.
    quick: Option<Product>,
    /// Whether an offline encoder shows, in the first repetition with howdah, what it makes of the state
    /// that arrived.
    #[serde(default)]
    encode: bool,
}

/// Every one of these with every one of those.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Product {
    applications: Vec<String>,
    links: Vec<String>,
    variants: Vec<Variant>,
}

/// One run.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Run {
    /// The guest.
    pub(crate) application: Application,
    /// What moves it, and how.
    pub(crate) variant: Variant,
    /// Over what.
    pub(crate) link: NamedLink,
    /// Counted from 1.
    pub(crate) repetition: u32,
    /// When it is given up.
    pub(crate) bound_s: f64,
    /// Whether the offline encoder looks at what arrived.
    pub(crate) encode: bool,
}

/// Which part of a plan is wanted.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub(crate) struct Selection {
    /// Only what the plan has for those in a hurry
    #[arg(long)]
    pub(crate) quick: bool,

    /// Only this table; may be given several times [default: all]
    #[arg(long = "table", value_name = "NAME")]
    pub(crate) tables: Vec<String>,

    /// Only runs whose names begin so; may be given several times [default: all]
    #[arg(long, value_name = "PREFIX")]
    pub(crate) only: Vec<String>,
}

impl Plan {
    /// Reads a file.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the plan {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{}", path.display()))
    }

    /// Reads the text of a file.
    fn parse(text: &str) -> Result<Self> {
        let plan: Self = toml::from_str(text)?;
        plan.validate()?;
        Ok(plan)
    }

    /// The runs of a part of the plan: first repetitions first, so that an evaluation that is ended early
    /// has something of everything.
    pub(crate) fn runs(&self, selection: &Selection) -> Result<Vec<Run>> {
        for name in &selection.tables {
            if !self.tables.iter().any(|table| table.name == *name) {
                let have: Vec<&str> = self.tables.iter().map(|table| table.name.as_str()).collect();
                bail!("no table {name:?} in the plan: have {}", have.join(", "));
            }
        }
        let repetitions = if selection.quick { self.quick.repetitions } else { self.repetitions };
        let mut runs: Vec<Run> = Vec::new();
        for repetition in 1..=repetitions {
            for table in &self.tables {
                if !selection.tables.is_empty() && !selection.tables.contains(&table.name) {
                    continue;
                }
                self.add(table, selection, repetition, &mut runs)?;
            }
        }
        let wanted = |run: &Run| {
            selection.only.is_empty()
                || selection.only.iter().any(|prefix| run.name().starts_with(prefix.as_str()))
        };
        runs.retain(wanted);
        Ok(runs)
    }

    fn add(
        &self,
        table: &Table,
        selection: &Selection,
        repetition: u32,
        runs: &mut Vec<Run>,
    ) -> Result<()> {
        let product = match (selection.quick, &table.quick) {
            (false, _) => table.product(),
            (true, Some(quick)) => quick.clone(),
            (true, None) => return Ok(()),
        };
        let bound_s = if selection.quick { self.quick.bound_s } else { self.bound_s };
        for application in &product.applications {
            for link in &product.links {
                for variant in &product.variants {
                    let run = Run {
                        application: self.application(application)?.clone(),
                        variant: variant.clone(),
                        link: self.link(link)?.clone(),
                        repetition,
                        bound_s,
                        encode: table.encode && repetition == 1 && variant.system == System::Howdah,
                    };
                    match runs.iter_mut().find(|other| other.name() == run.name()) {
                        Some(other) => other.encode |= run.encode,
                        None => runs.push(run),
                    }
                }
            }
        }
        Ok(())
    }

    fn application(&self, name: &str) -> Result<&Application> {
        let found = self.applications.iter().find(|one| one.name == name);
        found.with_context(|| format!("no application {name:?} in the plan"))
    }

    fn link(&self, name: &str) -> Result<&NamedLink> {
        let found = self.links.iter().find(|one| one.name == name);
        found.with_context(|| format!("no link {name:?} in the plan"))
    }

    fn validate(&self) -> Result<()> {
        for (what, bound_s, repetitions) in [
            ("the plan", self.bound_s, self.repetitions),
            ("quick", self.quick.bound_s, self.quick.repetitions),
        ] {
            if !(1.0..=MAX_BOUND_S).contains(&bound_s) || repetitions == 0 {
                bail!("{what}: bound_s must be 1 to {MAX_BOUND_S}, repetitions 1 or more");
            }
        }
        let names = self.applications.iter().map(|one| &one.name);
        unique("application", names)?;
        unique("link", self.links.iter().map(|one| &one.name))?;
        unique("table", self.tables.iter().map(|one| &one.name))?;
        for application in &self.applications {
            application.validate()?;
        }
        for link in &self.links {
            let rate = link.rate_mbps;
            if !(rate >= 0.0 && rate.is_finite() && (0.0..=100.0).contains(&link.loss_percent)) {
                bail!("link {}: rates are not negative, and loss is 0 to 100 %", link.name);
            }
        }
        for quick in [false, true] {
            // Names of applications and links are looked up, and runs must not share a file.
            let runs = self.runs(&Selection { quick, ..Selection::default() })?;
            unique("run", runs.iter().map(Run::name))?;
            for variant in self.tables.iter().flat_map(Table::variants) {
                plain("variant", &variant.name)?;
            }
        }
        Ok(())
    }
}

impl Table {
    fn product(&self) -> Product {
        Product {
            applications: self.applications.clone(),
            links: self.links.clone(),
            variants: self.variants.clone(),
        }
    }

    fn variants(&self) -> impl Iterator<Item = &Variant> {
        self.variants.iter().chain(self.quick.iter().flat_map(|quick| &quick.variants))
    }
}

impl Application {
    /// Whether somebody outside uses it.
    pub(crate) fn is_used(&self) -> bool {
        self.before.iter().any(|step| matches!(step, Step::Application(_)))
    }

    fn validate(&self) -> Result<()> {
        let allowed = |step: &Step| {
            matches!(
                step,
                Step::Agent { .. } | Step::Await { .. } | Step::Wait { .. } | Step::Application(_)
            )
        };
        if !self.before.iter().all(allowed) {
            bail!(
                "application {}: before has steps agent, await, wait and application only",
                self.name
            );
        }
        if self.memory_mib == 0 || self.vcpus == 0 || self.probe_ms == 0 {
            bail!("application {}: memory, vcpus and probe_ms are not 0", self.name);
        }
        Ok(())
    }
}

impl Run {
    /// Names the run, and its file: letters, digits and hyphens.
    pub(crate) fn name(&self) -> String {
        let variant = self.variant.name.replace(':', "-");
        let (system, link) = (self.variant.system.name(), &self.link.name);
        format!("{}-{system}-{variant}-{link}-r{}", self.application.name, self.repetition)
    }
}

fn unique(what: &str, names: impl Iterator<Item = impl AsRef<str>>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for name in names {
        let name = name.as_ref();
        if what != "run" {
            plain(what, name)?;
        }
        if !seen.insert(name.to_owned()) {
            bail!("{what} {name:?} is there twice");
        }
    }
    Ok(())
}

/// Names become parts of file names; what variants have colons for, hyphens stand for there.
fn plain(what: &str, name: &str) -> Result<()> {
    let colon = what == "variant";
    let plain = |byte: u8| {
        byte.is_ascii_lowercase()
            || byte.is_ascii_digit()
            || byte == b'-'
            || (colon && byte == b':')
    };
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
        bail!("{what} {name:?}: use 1 to {MAX_NAME_BYTES} lowercase letters, digits and hyphens");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = r#"
        repetitions = 2
        bound_s = 900
        quick = { repetitions = 1, bound_s = 60 }
        applications = [{ name = "idle", image = "minimal", memory_mib = 512, vcpus = 1 }]
        links = [{ name = "10", rate_mbps = 10 }, { name = "5", rate_mbps = 5 }]
        [[tables]]
        name = "peers"
        applications = ["idle"]
        links = ["10", "5"]
        variants = ["howdah/default", "qemu/precopy"]
        quick = { applications = ["idle"], links = ["10"], variants = ["howdah/default"] }
        [[tables]]
        name = "modes"
        applications = ["idle"]
        links = ["10"]
        variants = ["howdah/default", "howdah/static:zstd:3"]
        encode = true
    "#;

    fn names(selection: &Selection) -> Vec<String> {
        let runs = Plan::parse(PLAN).unwrap().runs(selection).unwrap();
        runs.iter().map(Run::name).collect()
    }

    #[test]
    fn runs_that_two_tables_ask_for_are_run_once_and_first_repetitions_first() {
        let runs = Plan::parse(PLAN).unwrap().runs(&Selection::default()).unwrap();
        assert_eq!(runs.len(), 10);
        let first: Vec<String> = runs[..5].iter().map(Run::name).collect();
        assert_eq!(
            first,
            [
                "idle-howdah-default-10-r1",
                "idle-qemu-precopy-10-r1",
                "idle-howdah-default-5-r1",
                "idle-qemu-precopy-5-r1",
                "idle-howdah-static-zstd-3-10-r1",
            ]
        );
        let encoded: Vec<bool> = runs.iter().map(|run| run.encode).collect();
        assert_eq!(encoded[..5], [true, false, false, false, true]);
        assert!(encoded[5..].iter().all(|encode| !encode));
    }

    #[test]
    fn a_part_of_it_is_chosen() {
        let quick = Selection { quick: true, ..Selection::default() };
        assert_eq!(names(&quick), ["idle-howdah-default-10-r1"]);
        let table = Selection { tables: vec!["modes".into()], ..Selection::default() };
        assert_eq!(names(&table).len(), 4);
        let only = Selection { only: vec!["idle-qemu".into()], ..Selection::default() };
        assert_eq!(names(&only).len(), 4);
        let odd = Selection { tables: vec!["nope".into()], ..Selection::default() };
        let error = Plan::parse(PLAN).unwrap().runs(&odd).unwrap_err().to_string();
        assert!(error.contains("have peers, modes"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        for (from, to, says) in [
            (r#""idle", image"#, r#""busy", image"#, r#"no application "idle""#),
            ("qemu/precopy", "xen/precopy", "xen/precopy"),
            ("bound_s = 900", "bound_s = 0", "bound_s"),
            (r#"name = "5""#, r#"name = "10""#, "twice"),
            (r#"name = "10""#, r#"name = "../10""#, "hyphens"),
            ("vcpus = 1", r#"vcpus = 1, before = [{ do = "cut" }]"#, "steps agent"),
            ("encode = true", "encoed = true", "encoed"),
        ] {
            let error = format!("{:#}", Plan::parse(&PLAN.replacen(from, to, 1)).unwrap_err());
            assert!(error.contains(says), "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn the_plan_of_the_project_is_right() {
        let plan = Path::new(env!("CARGO_MANIFEST_DIR")).join("paper.toml");
        let plan = Plan::load(&plan).unwrap();
        let runs = plan.runs(&Selection { quick: true, ..Selection::default() }).unwrap();
        assert!(!runs.is_empty());
    }
}
