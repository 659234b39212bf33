//! Events: what happens at a cloudlet, as it happens.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Operation, Vm};

/// Something that happened. A stream begins with one [`Event::Vm`] for each VM and one
/// [`Event::Operation`] for each operation, so that whoever follows it knows all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A VM is there, or is not as it was.
    Vm {
        /// How it is now.
        vm: Box<Vm>,
    },
    /// A VM is gone.
    VmGone {
        /// Its name.
        name: String,
    },
    /// An operation began, went on or ended.
    Operation {
        /// How it is now.
        operation: Box<Operation>,
    },
    /// The listener for peers did something: `listening`, `receiving`, `received`, `not-received`,
    /// `dropped`.
    Receive {
        /// What `howdah receive --json` prints.
        #[schema(value_type = Object)]
        what: serde_json::Value,
    },
    /// Events were lost, because this client was slow: ask for what it needs to know again.
    Lost {
        /// How many.
        events: u64,
    },
}

impl Event {
    /// The name of the event in the stream.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vm { .. } => "vm",
            Self::VmGone { .. } => "vm-gone",
            Self::Operation { .. } => "operation",
            Self::Receive { .. } => "receive",
            Self::Lost { .. } => "lost",
        }
    }
}
