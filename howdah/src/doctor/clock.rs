//! Whether the clocks of hosts agree: a guest's clock is set against them when it moved.

use std::time::Duration;

use nix::libc;

use super::Finding;

/// Beyond this, a guest that moves sees its clock off by more than a handoff's downtime.
const MOST_ERROR: Duration = Duration::from_millis(500);
const CHECK: &str = "clock";

/// What the kernel knows of its clock.
#[derive(Clone, Copy, Debug)]
struct Kept {
    synchronised: bool,
    most_error: Duration,
}

pub(super) fn look() -> Option<Finding> {
    // SAFETY: a timex of zeros is a valid one; `modes` 0 changes nothing.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `timex` is one, and outlives the call.
    let state = unsafe { libc::adjtimex(&mut timex) };
    if state < 0 {
        return None;
    }
    let synchronised = state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0;
    let most_error = Duration::from_micros(timex.maxerror.try_into().unwrap_or(0));
    Some(judge(Kept { synchronised, most_error }))
}

fn judge(kept: Kept) -> Finding {
    const MEND: &str = "apt-get install chrony, or timedatectl set-ntp true";
    if !kept.synchronised {
        let says = "not synchronised: guests that move between hosts find their clock wrong by what \
                    the hosts' clocks differ";
        return Finding::warning(CHECK, says).mended_by(MEND);
    }
    let most_ms = kept.most_error.as_millis();
    if kept.most_error > MOST_ERROR {
        let says = format!("synchronised, and may be wrong by {most_ms} ms");
        return Finding::warning(CHECK, says).mended_by("`chronyc sources -v` shows the servers");
    }
    Finding::ok(CHECK, format!("synchronised, wrong by {most_ms} ms at most"))
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn clocks_are_judged() {
        let kept = |synchronised, ms| {
            judge(Kept { synchronised, most_error: Duration::from_millis(ms) }).verdict
        };
        assert_eq!(kept(true, 5), Verdict::Ok);
        assert_eq!(kept(true, 900), Verdict::Warning);
        assert_eq!(kept(false, 0), Verdict::Warning);
    }
}
