//! The UDP echo: who is there, at which count, with what on its disk.
//!
//! A request is a token of 8 to 16 bytes; the answer is one line of JSON with the token in hex and
//! the agent's vital signs. Anything else is dropped: an answer goes only where it was asked for.

use std::io;
use std::net::UdpSocket;

use serde::{Deserialize, Serialize};

use crate::vitals::{Snapshot, Vitals};

/// The port that answers probes.
pub(crate) const PORT: u16 = 7777;
/// Bytes of the longest answer that a client takes.
pub(crate) const MAX_ANSWER_BYTES: usize = 2048;

const TOKEN_BYTES: std::ops::RangeInclusive<usize> = 8..=16;

/// One answer, as it goes over the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// The request's token, in hex.
    pub(crate) token: String,
    /// The agent's vital signs when it answered.
    #[serde(flatten)]
    pub(crate) vitals: Snapshot,
}

/// Answers for as long as the agent lives.
pub(crate) fn serve(socket: &UdpSocket, vitals: &Vitals) -> ! {
    loop {
        // Errors here come from the network (an unreachable asker): the next request may be fine.
        if let Err(error) = answer_one(socket, vitals)
            && error.kind() != io::ErrorKind::ConnectionRefused
        {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn answer_one(socket: &UdpSocket, vitals: &Vitals) -> io::Result<()> {
    // One byte more than the longest token, so that a longer request shows as such.
    let mut request = [0; *TOKEN_BYTES.end() + 1];
    let (length, asker) = socket.recv_from(&mut request)?;
    let Some(token) = request.get(..length).filter(|t| TOKEN_BYTES.contains(&t.len())) else {
        return Ok(());
    };
    let answer = Answer { token: hex::encode(token), vitals: vitals.snapshot() };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    socket.send_to(&line, asker).map(|_| ())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::vitals::Identity;

    #[test]
    fn answers_tokens_and_drops_everything_else() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
        asker.connect(server.local_addr().unwrap()).unwrap();
        asker.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let vitals = Vitals::new(Identity { boot_id: "b".into(), nonce: [0xab; 16] });

        for bad in [&b""[..], b"short", b"seventeen bytes!!"] {
            asker.send(bad).unwrap();
            answer_one(&server, &vitals).unwrap();
            assert!(asker.recv(&mut [0; MAX_ANSWER_BYTES]).is_err(), "answered {bad:?}");
        }
        asker.send(b"8 bytes!").unwrap();
        answer_one(&server, &vitals).unwrap();
        let mut line = [0; MAX_ANSWER_BYTES];
        let length = asker.recv(&mut line).unwrap();
        let answer: Answer = serde_json::from_slice(&line[..length]).unwrap();
        assert_eq!(answer.token, hex::encode(b"8 bytes!"));
        assert_eq!(answer.vitals.nonce, "ab".repeat(16));
    }
}
