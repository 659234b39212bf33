//! What a source says of the machine that it offers: the opaque part of the engine's offer.

use serde::{Deserialize, Serialize};
use vmm::MachineProfile;

use crate::{
    cli::{Cpu, Limits},
    home::VmConfig,
    net::Attachment,
};

/// The longest text that a user may append to a kernel command line.
pub(crate) const MAX_APPEND_BYTES: usize = 2048;

/// A machine on offer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MachineOffer {
    /// What it is.
    pub(crate) profile: MachineProfile,
    /// What its user appended to the kernel command line: for when it boots anew at the target.
    pub(crate) append: String,
    /// What else was said of it, and holds wherever it runs.
    pub(crate) setup: Setup,
}

/// What users said of a VM that is no part of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setup {
    /// Which CPU it is shown when it boots anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpu: Option<Cpu>,
    /// The network that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) network: Option<Attachment>,
    /// What it may take of its host.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub(crate) limits: Limits,
}

impl Setup {
    /// As the VM's configuration has it.
    pub(crate) fn of(config: &VmConfig) -> Self {
        Self { cpu: config.cpu, network: config.network.clone(), limits: config.limits }
    }
}

/// As bytes: a version of its own, because the profile has one too.
#[derive(Serialize, Deserialize)]
struct Encoded<'a> {
    version: u8,
    append: &'a str,
    profile: &'a [u8],
}

/// The same, with what else was said of the VM, as JSON. Only said where there is something to say, so
/// that other VMs can go to peers that read version 1 only.
#[derive(Serialize, Deserialize)]
struct EncodedWithSetup<'a> {
    version: u8,
    append: &'a str,
    profile: &'a [u8],
    setup: &'a [u8],
}

const VERSION: u8 = 1;
const VERSION_WITH_SETUP: u8 = 2;
/// The longest setup.
const MAX_SETUP_BYTES: usize = 16 << 10;

/// Why an offer cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OfferError {
    /// The bytes are something else.
    #[error("the offer of the machine cannot be read: {0}")]
    Codec(#[from] postcard::Error),
    /// More bytes than there should be.
    #[error("the offer of the machine has {0} bytes too many")]
    Trailing(usize),
    /// From another version of this program.
    #[error(
        "the offer of the machine has version {0}, this program reads {VERSION} and {VERSION_WITH_SETUP}"
    )]
    Version(u8),
    /// The appended text is too long or holds what a command line cannot.
    #[error(
        "the text appended to the kernel command line is not printable ASCII of at most {MAX_APPEND_BYTES} bytes"
    )]
    Append,
    /// What else was said of it.
    #[error("what was said of the VM cannot be read: {0}")]
    Setup(#[from] serde_json::Error),
    /// More of that than there should be.
    #[error("what was said of the VM has {0} bytes, at most {MAX_SETUP_BYTES} are read")]
    SetupLength(usize),
    /// The profile.
    #[error(transparent)]
    Profile(#[from] vmm::profile::ProfileError),
}

/// Whether a text may be appended to a kernel command line.
pub(crate) fn check_append(text: &str) -> Result<(), OfferError> {
    let plain = text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
    if plain && text.len() <= MAX_APPEND_BYTES { Ok(()) } else { Err(OfferError::Append) }
}

impl MachineOffer {
    /// As bytes for a peer.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, OfferError> {
        let profile = self.profile.encode()?;
        let (append, profile) = (self.append.as_str(), profile.as_slice());
        if self.setup == Setup::default() {
            return Ok(postcard::to_stdvec(&Encoded { version: VERSION, append, profile })?);
        }
        let setup = serde_json::to_vec(&self.setup)?;
        if setup.len() > MAX_SETUP_BYTES {
            return Err(OfferError::SetupLength(setup.len()));
        }
        let version = VERSION_WITH_SETUP;
        Ok(postcard::to_stdvec(&EncodedWithSetup { version, append, profile, setup: &setup })?)
    }

    /// From a peer's bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, OfferError> {
        let (version, _) = postcard::take_from_bytes::<u8>(bytes)?;
        let (append, profile, setup, rest) = match version {
            VERSION => {
                let (encoded, rest) = postcard::take_from_bytes::<Encoded>(bytes)?;
                (encoded.append, encoded.profile, None, rest)
            }
            VERSION_WITH_SETUP => {
                let (encoded, rest) = postcard::take_from_bytes::<EncodedWithSetup>(bytes)?;
                (encoded.append, encoded.profile, Some(encoded.setup), rest)
            }
            other => return Err(OfferError::Version(other)),
        };
        if !rest.is_empty() {
            return Err(OfferError::Trailing(rest.len()));
        }
        check_append(append)?;
        let setup = match setup {
            Some(setup) if setup.len() > MAX_SETUP_BYTES => {
                return Err(OfferError::SetupLength(setup.len()));
            }
            Some(setup) => serde_json::from_slice(setup)?,
            None => Setup::default(),
        };
        let profile = MachineProfile::decode(profile)?;
        Ok(Self { profile, append: append.to_owned(), setup })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> MachineOffer {
        let profile = MachineProfile {
            vcpus: 2,
            memory_bytes: 512 << 20,
            disk: true,
            mac: Some([2, 0, 0, 0, 0, 1]),
            cpuid: vec![Default::default()],
            tsc_khz: 2_000_000,
            xsave_bytes: 4096,
        };
        MachineOffer { profile, append: "quiet".into(), setup: Setup::default() }
    }

    /// A VM of which nothing is said can go to those who read the first version only.
    #[test]
    fn what_was_said_of_it_makes_another_version() {
        let limits = Limits { disk_iops: Some(7), ..Limits::default() };
        let setup = Setup { cpu: "v3".parse().ok(), network: None, limits };
        for (setup, version) in [(Setup::default(), 1), (setup, 2)] {
            let offer = MachineOffer { setup, ..offer() };
            let bytes = offer.encode().unwrap();
            assert_eq!(bytes[0], version);
            assert_eq!(MachineOffer::decode(&bytes).unwrap(), offer);
            for len in 0..bytes.len() {
                MachineOffer::decode(&bytes[..len]).unwrap_err();
            }
            MachineOffer::decode(&[&bytes[..], &[0]].concat()).unwrap_err();
        }
    }

    #[test]
    fn an_offer_survives_and_damage_is_an_error() {
        let Ok(bytes) = offer().encode() else { panic!("a plain offer") };
        assert_eq!(MachineOffer::decode(&bytes).unwrap(), offer());
        for len in 0..bytes.len() {
            MachineOffer::decode(&bytes[..len]).unwrap_err();
        }
        MachineOffer::decode(&[&bytes[..], &[0]].concat()).unwrap_err();
        let foreign = MachineOffer { append: "a\nb".into(), ..offer() }.encode().unwrap();
        assert!(matches!(MachineOffer::decode(&foreign), Err(OfferError::Append)));
    }
}
