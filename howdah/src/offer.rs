//! What a source says of the machine that it offers: the opaque part of the engine's offer.

use serde::{Deserialize, Serialize};
use vmm::MachineProfile;

/// The longest text that a user may append to a kernel command line.
pub(crate) const MAX_APPEND_BYTES: usize = 2048;

/// A machine on offer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MachineOffer {
    /// What it is.
    pub(crate) profile: MachineProfile,
    /// What its user appended to the kernel command line: for when it boots anew at the target.
    pub(crate) append: String,
}

/// As bytes: a version of its own, because the profile has one too.
#[derive(Serialize, Deserialize)]
struct Encoded<'a> {
    version: u8,
    append: &'a str,
    profile: &'a [u8],
}

const VERSION: u8 = 1;

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
    #[error("the offer of the machine has version {0}, this program reads {VERSION}")]
    Version(u8),
    /// The appended text is too long or holds what a command line cannot.
    #[error(
        "the text appended to the kernel command line is not printable ASCII of at most {MAX_APPEND_BYTES} bytes"
    )]
    Append,
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
        let encoded = Encoded { version: VERSION, append: &self.append, profile: &profile };
        Ok(postcard::to_stdvec(&encoded)?)
    }

    /// From a peer's bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, OfferError> {
        let (encoded, rest) = postcard::take_from_bytes::<Encoded>(bytes)?;
        if encoded.version != VERSION {
            return Err(OfferError::Version(encoded.version));
        }
        if !rest.is_empty() {
            return Err(OfferError::Trailing(rest.len()));
        }
        check_append(encoded.append)?;
        let profile = MachineProfile::decode(encoded.profile)?;
        Ok(Self { profile, append: encoded.append.to_owned() })
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
        MachineOffer { profile, append: "quiet".into() }
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
