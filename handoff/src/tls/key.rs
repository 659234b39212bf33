//! Who a cloudlet is: its key, and the short name of a key.

use std::{fmt, str::FromStr, sync::Arc};

use data_encoding::{BASE32_NOPAD, BASE64};
use ring::{
    digest::{SHA256, SHA256_OUTPUT_LEN, digest},
    rand::SystemRandom,
    signature::Ed25519KeyPair,
};
use rustls::{
    crypto::ring::sign::any_eddsa_type,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem, pem::PemObject},
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// What every key's name begins with.
const PREFIX: &str = "howdah:";
/// Characters in a line of a PEM file.
const PEM_LINE: usize = 64;

/// The name of a cloudlet's public key: what peers pin.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerKey([u8; SHA256_OUTPUT_LEN]);

/// A text that names no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no key: one is {PREFIX} and 52 letters and digits, as `howdah identity` shows it"
)]
pub struct PeerKeyError(String);

impl PeerKey {
    /// The name of a public key, given as a SubjectPublicKeyInfo.
    pub(super) fn of(spki: &[u8]) -> Self {
        let mut name = [0; SHA256_OUTPUT_LEN];
        name.iter_mut().zip(digest(&SHA256, spki).as_ref()).for_each(|(to, from)| *to = *from);
        Self(name)
    }
}

impl fmt::Display for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
    }
}

impl fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PeerKey {
    type Err = PeerKeyError;

    fn from_str(text: &str) -> Result<Self, PeerKeyError> {
        let wrong = || PeerKeyError(text.chars().take(80).collect());
        let code = text.strip_prefix(PREFIX).ok_or_else(wrong)?.to_ascii_uppercase();
        let bytes = BASE32_NOPAD.decode(code.as_bytes()).map_err(|_| wrong())?;
        bytes.try_into().map(Self).map_err(|_| wrong())
    }
}

impl TryFrom<String> for PeerKey {
    type Error = PeerKeyError;

    fn try_from(text: String) -> Result<Self, PeerKeyError> {
        text.parse()
    }
}

impl From<PeerKey> for String {
    fn from(key: PeerKey) -> Self {
        key.to_string()
    }
}

/// A cloudlet's own key pair.
pub struct Identity {
    pkcs8: Zeroizing<Vec<u8>>,
    pub(super) certified: Arc<CertifiedKey>,
    key: PeerKey,
}

/// Why there is no key pair.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The system gave no randomness.
    #[error("a key cannot be made: the system gives no random numbers")]
    Random,
    /// Not a PEM file with one private key.
    #[error("no private key in PEM: {0}")]
    Pem(pem::Error),
    /// Another kind of key, or damage.
    #[error("no Ed25519 key in PKCS #8: {0}")]
    Key(rustls::Error),
}

impl Identity {
    /// Makes one.
    pub fn generate() -> Result<Self, IdentityError> {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        Self::from_pkcs8(document.map_err(|_| IdentityError::Random)?.as_ref())
    }

    /// Reads one, as [`Identity::to_pem`] gave it.
    pub fn from_pem(text: &[u8]) -> Result<Self, IdentityError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(text).map_err(IdentityError::Pem)?;
        let der = Zeroizing::new(der.secret_pkcs8_der().to_vec());
        Self::from_pkcs8(&der)
    }

    fn from_pkcs8(der: &[u8]) -> Result<Self, IdentityError> {
        let signing = any_eddsa_type(&PrivatePkcs8KeyDer::from(der)).map_err(IdentityError::Key)?;
        let no_public =
            || IdentityError::Key(rustls::Error::General("it has no public half".into()));
        let spki = signing.public_key().ok_or_else(no_public)?.as_ref().to_vec();
        let key = PeerKey::of(&spki);
        // A raw public key takes the place of a certificate.
        let certified = Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], signing));
        Ok(Self { pkcs8: Zeroizing::new(der.to_vec()), certified, key })
    }

    /// As text, for a file that nobody else may read.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let code = Zeroizing::new(BASE64.encode(&self.pkcs8));
        let mut text = Zeroizing::new(String::with_capacity(2 * code.len() + 64));
        text.push_str("-----BEGIN PRIVATE KEY-----\n");
        let mut rest = code.as_str();
        while !rest.is_empty() {
            // Base 64 is ASCII: every place is between characters.
            let (line, more) = rest.split_at(rest.len().min(PEM_LINE));
            text.push_str(line);
            text.push('\n');
            rest = more;
        }
        text.push_str("-----END PRIVATE KEY-----\n");
        text
    }

    /// What peers pin.
    pub fn key(&self) -> PeerKey {
        self.key
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_identity_survives_its_file() {
        let one = Identity::generate().unwrap();
        let again = Identity::from_pem(one.to_pem().as_bytes()).unwrap();
        assert_eq!(one.key(), again.key());
        assert_ne!(one.key(), Identity::generate().unwrap().key());
        assert!(!format!("{one:?}").contains("PRIVATE"));
    }

    #[test]
    fn what_is_no_key_says_so() {
        let pem = Identity::generate().unwrap().to_pem();
        for bad in ["", "howdah:", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
        {
            Identity::from_pem(bad.as_bytes()).unwrap_err();
        }
        Identity::from_pem(&pem.as_bytes()[..pem.len() / 2]).unwrap_err();
    }

    #[test]
    fn names_are_read_as_they_are_shown() {
        let key = Identity::generate().unwrap().key();
        let text = key.to_string();
        assert_eq!(text.len(), PREFIX.len() + 52);
        assert_eq!(text.parse(), Ok(key));
        assert_eq!(text.to_ascii_uppercase().replace("HOWDAH:", PREFIX).parse(), Ok(key));
        for bad in ["", "howdah:", &text[7..], &text[..text.len() - 1], &format!("{text}a")] {
            bad.parse::<PeerKey>().unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_odd(text in "\\PC{0,80}") {
            if let Ok(key) = text.parse::<PeerKey>() {
                prop_assert_eq!(key.to_string().parse(), Ok(key));
            }
        }
    }
}
