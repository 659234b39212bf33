//! The filters of system calls: made before the first is applied, applied thread by thread.

use std::{collections::BTreeMap, io, sync::OnceLock};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::{
    calls::{self, Calls, Kind},
    trap,
};

/// What this process is held to, once it is.
static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Why there are no filters.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FilterError {
    /// The rules make no program: a defect.
    #[error("the filter of system calls cannot be made: {0}")]
    Program(#[from] seccompiler::BackendError),
    /// The kernel takes none.
    #[error("the kernel takes no filter of system calls (CONFIG_SECCOMP_FILTER): {0}")]
    Apply(#[from] seccompiler::Error),
    /// What a filter does with a forbidden call cannot be set up.
    #[error("cannot handle SIGSYS: {0}")]
    Trap(#[source] io::Error),
    /// A process that is confined already.
    #[error("the process is confined already")]
    Twice,
}

/// The programs for each kind of thread.
#[derive(Debug)]
struct Filters(BTreeMap<Kind, Vec<BpfProgram>>);

impl Filters {
    fn new(pid: u32) -> Result<Self, FilterError> {
        let programs = Kind::ALL.into_iter().map(|kind| {
            // The handler tells of what is not allowed and decides what becomes of it.
            let trap = program(calls::of(kind, pid)?, SeccompAction::Trap, SeccompAction::Allow)?;
            let no_access = SeccompAction::Errno(libc::EACCES as u32);
            let denied = program(calls::denied(), SeccompAction::Allow, no_access)?;
            Ok((kind, if kind.faces_the_guest() { vec![denied, trap] } else { vec![trap] }))
        });
        Ok(Self(programs.collect::<Result<_, FilterError>>()?))
    }
}

fn program(
    calls: Calls,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, FilterError> {
    let filter = SeccompFilter::new(calls, otherwise, matched, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// Holds this thread, and all that it will start, to what [`Kind::Main`] may do. For a process that
/// has no other threads yet. From here on no program that is started gets more rights than its
/// starter has.
pub(super) fn confine_process() -> Result<(), FilterError> {
    let filters = Filters::new(std::process::id())?;
    let no_such_call = SeccompAction::Errno(libc::ENOSYS as u32);
    let absent = program(calls::absent()?, SeccompAction::Allow, no_such_call)?;
    let main = filters.0.get(&Kind::Main).cloned().unwrap_or_default();
    if FILTERS.set(filters).is_err() {
        return Err(FilterError::Twice);
    }
    trap::handle().map_err(FilterError::Trap)?;
    trap::this_thread_is(Kind::Main);
    for program in std::iter::once(&absent).chain(&main) {
        seccompiler::apply_filter(program)?;
    }
    Ok(())
}

/// Narrows what this thread, and those that it starts, may do. Does nothing in a process that is
/// not confined.
pub(super) fn confine_thread(kind: Kind) -> Result<(), FilterError> {
    let Some(programs) = FILTERS.get().and_then(|filters| filters.0.get(&kind)) else {
        return Ok(());
    };
    for program in programs {
        seccompiler::apply_filter(program)?;
    }
    trap::this_thread_is(kind);
    Ok(())
}
