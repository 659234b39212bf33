//! The stream of events, one after another.

use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::runtime::Runtime;

use super::{Client, ClientError, link};
use crate::Event;

/// No event is longer.
const MAX_EVENT_BYTES: usize = 64 << 20;

/// Events as they come; ends when the daemon does.
#[derive(Debug)]
pub struct Events {
    runtime: Runtime,
    body: Incoming,
    pending: Vec<u8>,
}

impl Client {
    /// Follows what happens.
    pub fn events(&self) -> Result<Events, ClientError> {
        let runtime = link::runtime().map_err(|e| self.broken(e))?;
        let request = self.request(http::Method::GET, "/v1/events", None::<&()>)?;
        let response = runtime.block_on(async {
            link::send(self.connect()?, request).await.map_err(|e| self.broken(e))
        })?;
        if !response.status().is_success() {
            let status = response.status().as_u16();
            let (what, why) = ("events".into(), "no events are sent".into());
            return Err(ClientError::Foreign { what, status, why });
        }
        Ok(Events { runtime, body: response.into_body(), pending: Vec::new() })
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        loop {
            while let Some(message) = take_message(&mut self.pending) {
                // Events that a later daemon has and this client does not know are passed over.
                if let Some(event) = parse(&message) {
                    return Some(event);
                }
            }
            if self.pending.len() > MAX_EVENT_BYTES {
                return None;
            }
            let frame = self.runtime.block_on(self.body.frame())?.ok()?;
            if let Ok(data) = frame.into_data() {
                self.pending.extend_from_slice(&data);
            }
        }
    }
}

/// What is before the next empty line.
fn take_message(pending: &mut Vec<u8>) -> Option<Vec<u8>> {
    let end = pending.windows(2).position(|two| two == b"\n\n")?;
    let rest = pending.split_off(end + 2);
    let mut message = std::mem::replace(pending, rest);
    message.truncate(end);
    Some(message)
}

/// The data lines of a message, joined; comments and other fields mean nothing here.
fn parse(message: &[u8]) -> Option<Event> {
    let text = std::str::from_utf8(message).ok()?;
    let data: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data:"))
        .map(|data| data.strip_prefix(' ').unwrap_or(data))
        .collect();
    serde_json::from_str(&data.join("\n")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_apart_at_empty_lines() {
        let mut pending = b": hello\n\nevent: vm-gone\ndata: {\"event\":\"vm-gone\",\ndata: \"name\":\"a\"}\n\ndata: {".to_vec();
        let comment = take_message(&mut pending).unwrap();
        assert_eq!(parse(&comment), None);
        let message = take_message(&mut pending).unwrap();
        assert_eq!(parse(&message), Some(Event::VmGone { name: "a".into() }));
        assert_eq!(take_message(&mut pending), None);
        assert_eq!(pending, b"data: {");
    }
}
