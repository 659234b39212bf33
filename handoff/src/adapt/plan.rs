//! Which modes together keep workers and link busy.
//!
//! Of each byte of a body, a mode takes P ÷ workers of the workers' time and R ÷ bandwidth of the
//! link's: throughput is the lesser of what each manages. Where one mode leaves the link waiting and
//! another the workers, bodies in one and the other in turn leave neither, and get through faster than
//! in any mode alone: the best two are found, or the best one.

use super::estimate::Estimate;

/// What a stronger mode must bring: of data that does not shrink all take as long.
const WORTH: f64 = 0.999;
/// How much sooner all must be over for a part of it to go out as it is, if it would shrink: others
/// use the link too, and what is left of a plan that was made too early is many bytes.
const RAW_WORTH: f64 = 1.1;
/// What is left of a body that goes out nearly as it is.
const RAW_RATIO: f64 = 0.7;

/// One mode, or two in turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Plan {
    /// Places in the list of modes: the faster, and the stronger, which may be the same.
    pub(super) fast: usize,
    pub(super) strong: usize,
    /// Seconds for each byte of bodies.
    pub(super) s_per_byte: f64,
}

/// What a mode takes of workers and of the link, in seconds a byte.
fn takes(mode: &Estimate, workers: f64, link: f64) -> (f64, f64) {
    (mode.s_per_byte / workers, mode.ratio / link)
}

/// Seconds for each byte of bodies in one mode alone.
pub(super) fn alone(mode: &Estimate, workers: f64, link: f64) -> f64 {
    let (work, send) = takes(mode, workers, link);
    work.max(send)
}

/// Seconds for each byte of bodies where two modes take turns.
pub(super) fn in_turn(one: &Estimate, other: &Estimate, workers: f64, link: f64) -> f64 {
    let alone = alone(one, workers, link).min(alone(other, workers, link));
    let ((work_a, send_a), (work_b, send_b)) =
        (takes(one, workers, link), takes(other, workers, link));
    let (spare_a, spare_b) = (send_a - work_a, send_b - work_b);
    // Only where one of them waits for the link and the other for workers.
    if spare_a * spare_b >= 0.0 {
        return alone;
    }
    let part = spare_a / (spare_a - spare_b);
    alone.min(work_a + part * (work_b - work_a))
}

/// The best of `modes`; none if there are none.
pub(super) fn best(modes: &[Estimate], workers: f64, link: f64) -> Option<Plan> {
    let mut best: Option<(f64, Plan)> = None;
    for (at, one) in modes.iter().enumerate() {
        for (by, other) in modes.iter().enumerate().skip(at) {
            let s_per_byte = in_turn(one, other, workers, link);
            let wasteful = one.ratio.max(other.ratio) > RAW_RATIO
                && one.ratio.min(other.ratio) < RAW_RATIO / 2.0;
            let counts = s_per_byte * if wasteful { RAW_WORTH } else { 1.0 };
            // Modes come from fast to strong: one that brings next to nothing is not worth its CPU.
            if best.is_some_and(|(least, _)| counts >= least * WORTH) {
                continue;
            }
            let (one_alone, other_alone) = (alone(one, workers, link), alone(other, workers, link));
            let (fast, strong) = match s_per_byte < one_alone.min(other_alone) {
                true if one.s_per_byte <= other.s_per_byte => (at, by),
                true => (by, at),
                false if one_alone <= other_alone => (at, at),
                false => (by, by),
            };
            best = Some((counts, Plan { fast, strong, s_per_byte }));
        }
    }
    best.map(|(_, plan)| plan)
}
