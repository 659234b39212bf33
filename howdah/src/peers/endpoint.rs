//! Where a peer is, and who it is: as users say it, and as records keep it.

use std::{fmt, net::ToSocketAddrs, str::FromStr};

use handoff::tls::PeerKey;

use super::book::{Book, Peer, Right};
use crate::failure::{Exit, Failure};

/// One end of a link, as an ownership record keeps it: `howdah:KEY@HOST:PORT`, or `HOST:PORT` of a peer
/// that is spoken to without TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Who must answer there; nobody in particular on a plain link.
    pub(crate) key: Option<PeerKey>,
    /// `HOST:PORT`.
    pub(crate) address: String,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(key) = self.key {
            write!(f, "{key}@")?;
        }
        f.write_str(&self.address)
    }
}

impl FromStr for Endpoint {
    type Err = handoff::tls::PeerKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('@') {
            Some((key, address)) => Ok(Self { key: Some(key.parse()?), address: address.into() }),
            None => Ok(Self { key: None, address: text.into() }),
        }
    }
}

impl Endpoint {
    /// From an ownership record.
    pub(crate) fn recorded(peer: &str) -> Result<Self, Failure> {
        peer.parse().map_err(|e| {
            let way_out = "restore the VM's directory, or `howdah vm takeover`";
            Failure::new(Exit::Corrupt, "the peer in the ownership record", e, way_out)
        })
    }

    /// Whether it is who calls, known by that key. Without TLS nobody knows who it was, and who calls may
    /// be anybody.
    pub(crate) fn is(&self, caller: Option<PeerKey>) -> bool {
        self.key.is_none() || self.key == caller
    }

    /// For people: by its name, if it is known.
    pub(crate) fn shown(&self, book: &Book) -> String {
        match self.key.map(|key| (key, book.by_key(key))) {
            Some((_, Some(peer))) => format!("{} ({})", peer.name, self.address),
            Some((key, None)) => format!("{key} ({})", self.address),
            None => self.address.clone(),
        }
    }
}

/// What a user means by the peer of a handoff: a peer's name, `NAME@HOST:PORT`, or the `HOST:PORT` of a
/// peer. With `plain` any `HOST:PORT`.
pub(crate) fn resolve(book: &Book, text: &str, plain: bool) -> Result<Endpoint, Failure> {
    resolve_for(book, text, plain, Some(Right::Receive))
}

/// As [`resolve`], for what needs this right of the peer, or none but that it is known.
pub(crate) fn resolve_for(
    book: &Book,
    text: &str,
    plain: bool,
    right: Option<Right>,
) -> Result<Endpoint, Failure> {
    if plain {
        check_address(text)?;
        return Ok(Endpoint { key: None, address: text.into() });
    }
    let (peer, address) = match text.split_once('@') {
        Some((name, address)) => (named(book, name)?, Some(address)),
        None if text.contains(':') => (at(book, text)?, Some(text)),
        None => (named(book, text)?, None),
    };
    right.map_or(Ok(()), |right| peer.check(right))?;
    let Some(address) = address.or(peer.address.as_deref()) else {
        let way_out = format!(
            "say {0}@HOST:PORT, or `howdah peer add {0} {1} --address HOST:PORT`",
            peer.name, peer.key
        );
        let what = format!("peer {}", peer.name);
        return Err(Failure::new(Exit::Usage, what, "no address is known of it", way_out));
    };
    check_address(address)?;
    Ok(Endpoint { key: Some(peer.key), address: address.into() })
}

/// The peer of a name.
pub(super) fn named<'a>(book: &'a Book, name: &str) -> Result<&'a Peer, Failure> {
    book.by_name(name).ok_or_else(|| {
        let way_out = "`howdah peer ls` shows those there are; an address is HOST:PORT";
        Failure::new(Exit::NotFound, format!("peer {name}"), "there is none of that name", way_out)
    })
}

/// The one peer at an address.
fn at<'a>(book: &'a Book, address: &str) -> Result<&'a Peer, Failure> {
    let what = format!("peer {address}");
    let mut found = book.peers().iter().filter(|peer| peer.address.as_deref() == Some(address));
    match (found.next(), found.next()) {
        (Some(peer), None) => Ok(peer),
        (Some(_), Some(_)) => {
            let way_out = "name the one that is meant (`howdah peer ls`)";
            Err(Failure::new(Exit::Conflict, what, "several peers have that address", way_out))
        }
        (None, _) => {
            check_address(address)?;
            let why =
                "no peer has that address, so that whoever answers would be trusted with the guest";
            let way_out = format!(
                "`howdah identity` there shows its key; `howdah peer add NAME KEY --address \
                {address}` here pins it (or --plain on both ends, in a network that you trust)"
            );
            Err(Failure::new(Exit::NotFound, what, why, way_out))
        }
    }
}

/// A name that cannot be looked up is the user's to mend; said before the guest is bothered.
pub(crate) fn check_address(address: &str) -> Result<(), Failure> {
    let bad = |why: &dyn fmt::Display| {
        let way_out = "give HOST:PORT, where `howdah receive` listens";
        Failure::new(Exit::Usage, format!("peer {address}"), why, way_out)
    };
    let mut found = address.to_socket_addrs().map_err(|e| bad(&e))?;
    found.next().map(drop).ok_or_else(|| bad(&"no address"))
}

#[cfg(test)]
mod tests {
    use handoff::tls::Identity;

    use super::*;
    use crate::peers::Rights;

    fn peer(name: &str, address: Option<&str>) -> Peer {
        let key = Identity::generate().unwrap().key();
        Peer { address: address.map(str::to_owned), ..Peer::new(name.parse().unwrap(), key) }
    }

    #[test]
    fn a_record_names_who_it_was() {
        let key = Identity::generate().unwrap().key();
        for endpoint in [
            Endpoint { key: Some(key), address: "[::1]:7070".into() },
            Endpoint { key: None, address: "b.example:7070".into() },
        ] {
            assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
        }
        assert!("howdah:abc@b:1".parse::<Endpoint>().is_err());
    }

    #[test]
    fn a_caller_is_known_by_its_key_where_there_is_one() {
        let [key, other] = [0; 2].map(|_| Identity::generate().unwrap().key());
        let at = |key| Endpoint { key, address: "b:1".into() };
        assert!(at(Some(key)).is(Some(key)));
        assert!(!at(Some(key)).is(Some(other)) && !at(Some(key)).is(None));
        assert!(at(None).is(None) && at(None).is(Some(key)));
    }

    #[test]
    fn peers_are_found_by_name_and_by_address() {
        let (b, c) = (peer("b", Some("127.0.0.1:7070")), peer("c", None));
        let book = Book::of(vec![b.clone(), c.clone()]);
        let found = |text| resolve(&book, text, false);
        let of_b = Endpoint { key: Some(b.key), address: "127.0.0.1:7070".into() };
        assert_eq!(found("b"), Ok(of_b.clone()));
        assert_eq!(found("127.0.0.1:7070"), Ok(of_b));
        let of_c = Endpoint { key: Some(c.key), address: "127.0.0.1:7071".into() };
        assert_eq!(found("c@127.0.0.1:7071"), Ok(of_c));
        assert_eq!(found("c").unwrap_err().exit, Exit::Usage);
        assert_eq!(found("127.0.0.1:7072").unwrap_err().exit, Exit::NotFound);
        assert_eq!(found("d").unwrap_err().exit, Exit::NotFound);
        assert_eq!(found("b@nowhere").unwrap_err().exit, Exit::Usage);
        let plain = resolve(&book, "127.0.0.1:7072", true).unwrap();
        assert_eq!(plain.to_string(), "127.0.0.1:7072");
    }

    #[test]
    fn a_peer_that_may_not_receive_is_sent_nothing() {
        let rights = Rights { receive: false, ..Rights::VMS };
        let book = Book::of(vec![Peer { rights, ..peer("b", Some("127.0.0.1:7070")) }]);
        assert_eq!(resolve(&book, "b", false).unwrap_err().exit, Exit::Conflict);
    }

    #[test]
    fn addresses_are_checked_before_anything_moves() {
        check_address("127.0.0.1:7070").unwrap();
        for bad in ["", "nowhere", "127.0.0.1", "127.0.0.1:99999"] {
            assert_eq!(check_address(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }
}
