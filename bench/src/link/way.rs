//! The real link where that is permitted, and one that is made up where not.

use std::{io, time::Instant};

use handoff::sim::{LinkShape, Outage, Rate};

use super::{Channel, Link, Shape};
use crate::hand_off::Road;

/// A link, or what stands in for one.
pub(crate) enum Way {
    /// Between two namespaces.
    Real(Link),
    /// Made up: its time begins with the first connection, not far from then.
    Simulated(Box<LinkShape>, Instant),
}

impl Way {
    pub(crate) fn new(shape: &Shape) -> io::Result<Self> {
        match Link::new(shape) {
            Ok(link) => Ok(Self::Real(link)),
            Err(e) if matches!(e.kind(), NOT_PERMITTED | NOT_THERE) => {
                let mut rates = shape.rates.iter().map(|(at, bits)| (*at, bits / 8.0));
                let first = Rate::bytes_per_s(rates.next().map_or(f64::MAX, |(_, rate)| rate));
                let rate = rates.fold(first, |all, (at, rate)| all.then_bytes_per_s(at, rate));
                let outages =
                    shape.cuts.iter().map(|cut| Outage { from: cut.start, until: cut.end });
                let outages = outages.collect();
                let shape = LinkShape { outages, ..LinkShape::symmetric(rate, shape.delay) };
                Ok(Self::Simulated(Box::new(shape), Instant::now()))
            }
            Err(e) => Err(e),
        }
    }

    /// What results call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Real(_) => "tcp between namespaces",
            Self::Simulated(..) => "simulated",
        }
    }

    pub(crate) fn road<'a>(&'a self, congestion_control: Option<&'a str>) -> Road<'a> {
        match self {
            Self::Real(link) => Road::Link(link, congestion_control),
            Self::Simulated(shape, _) => Road::Simulated(shape),
        }
    }

    pub(crate) fn origin(&self) -> Instant {
        match self {
            Self::Real(link) => link.origin,
            Self::Simulated(_, origin) => *origin,
        }
    }

    /// Ends the link and says what went over it, if that is known.
    pub(crate) fn end(self) -> Option<Channel> {
        match self {
            Self::Real(link) => link.end(),
            Self::Simulated(..) => None,
        }
    }
}

const NOT_PERMITTED: io::ErrorKind = io::ErrorKind::PermissionDenied;
const NOT_THERE: io::ErrorKind = io::ErrorKind::NotFound;
