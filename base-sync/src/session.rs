//! Who begins, and which side gives.

use std::io::{Read, Write};

use guest_images::{Base, BaseId, Manifest, Store};

use crate::{
    give::{self, Given},
    link::Link,
    take::{self, Progress, Taken, Taking},
    wire::{MAX_TEXT_BYTES, Message, No, SyncError, Why},
};

/// What this side allows. What only a called side is asked, it denies unless said otherwise.
pub trait Host {
    /// Whether so many bytes more of the store's disk may be used.
    fn room(&self, more_bytes: u64) -> Result<(), No>;
    /// Whether these bytes are a machine state.
    fn machine(&self, state: &[u8]) -> Result<(), No>;
    /// Whether the caller may have this base.
    fn may_pull(&self, _base: &Base) -> Result<(), No> {
        Err(No::new(Why::NotAllowed, "bases are not given here"))
    }
    /// Whether the caller may bring this base, to be called `name`.
    fn may_push(&self, _id: &BaseId, _name: &str) -> Result<(), No> {
        Err(No::new(Why::NotAllowed, "bases are not taken here"))
    }
}

/// How a session with a caller went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// A base was given.
    Given(BaseId, Given),
    /// A base was taken, and has this name.
    Taken(BaseId, String, Taken),
}

/// Gives a base to the peer that was called, which calls it `name`.
pub fn push<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    store: &Store,
    base: &Base,
    name: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<Given, SyncError> {
    let name = name.to_owned();
    link.send(&Message::Push { name, manifest: manifest_of(base)? })?;
    let given = give::give(link, store, base, progress);
    told(link, given)
}

/// Takes a base from the peer that was called: `which` is a name or an id there. It is not named here.
/// `heal` is set for an id only.
pub fn pull<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    which: &str,
    taking: &mut Taking<'_>,
) -> Result<(BaseId, Taken), SyncError> {
    link.send(&Message::Pull(which.to_owned()))?;
    let Message::Offer(manifest) = link.receive()? else {
        return Err(SyncError::Protocol("it does not answer with a base"));
    };
    let taken = Manifest::parse(&manifest)
        .map_err(|_| SyncError::Protocol("what it offers has no manifest"))
        .and_then(|manifest| {
            // Whoever names an id wants that base and no other.
            let other = which.parse::<BaseId>().is_ok_and(|id| id != manifest.id());
            if other {
                return Err(SyncError::Protocol("it offers another base than was asked for"));
            }
            let taken = take::take(link, &manifest, taking)?;
            link.send(&Message::Done { already: taken.already })?;
            Ok((manifest.id(), taken))
        });
    told(link, taken)
}

/// Serves one caller: gives what it asks for, or takes what it brings, as its host allows.
pub fn serve<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    taking: &mut Taking<'_>,
) -> Result<Served, SyncError> {
    let served = match link.receive()? {
        Message::Pull(which) if which.len() <= MAX_TEXT_BYTES => serve_pull(link, taking, &which),
        Message::Push { name, manifest } => serve_push(link, taking, name, &manifest),
        _ => Err(SyncError::Protocol("it begins neither with Push nor with Pull")),
    };
    told(link, served)
}

fn serve_pull<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    taking: &mut Taking<'_>,
    which: &str,
) -> Result<Served, SyncError> {
    let base = taking.store.get(which)?;
    taking.host.may_pull(&base).map_err(SyncError::Unwilling)?;
    link.send(&Message::Offer(manifest_of(&base)?))?;
    let given = give::give(link, taking.store, &base, taking.progress)?;
    Ok(Served::Given(base.id(), given))
}

fn serve_push<R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    taking: &mut Taking<'_>,
    name: String,
    manifest: &[u8],
) -> Result<Served, SyncError> {
    let manifest =
        Manifest::parse(manifest).map_err(|_| SyncError::Protocol("it brings no manifest"))?;
    let id = manifest.id();
    taking.host.may_push(&id, &name).map_err(SyncError::Unwilling)?;
    let free = |store: &Store| match store.resolve_name(&name)? {
        Some(other) if other != id => {
            let text = format!("{name} is another base there; push it under another name (--as)");
            Err(SyncError::Unwilling(No::new(Why::Taken, text)))
        }
        named => Ok(named.is_none()),
    };
    free(taking.store)?;
    let taken = take::take(link, &manifest, taking)?;
    // Somebody may have taken the name meanwhile: then the base is there under its id.
    if free(taking.store)? {
        taking.store.name(&name, &id)?;
    }
    link.send(&Message::Done { already: taken.already })?;
    Ok(Served::Taken(id, name, taken))
}

fn manifest_of(base: &Base) -> Result<Vec<u8>, SyncError> {
    let invalid = |error| std::io::Error::new(std::io::ErrorKind::InvalidData, error);
    let manifest = base.manifest().to_json();
    manifest.map_err(|error| SyncError::Read { id: base.id(), source: invalid(error) })
}

/// Tells the other side why it came to nothing here.
fn told<T, R: Read, W: Write>(
    link: &mut Link<'_, R, W>,
    done: Result<T, SyncError>,
) -> Result<T, SyncError> {
    if let Err(no) = done.as_ref().map_err(SyncError::told)
        && let Some(no) = no
        && link.send(&Message::No(no)).is_ok()
    {
        link.linger();
    }
    done
}
