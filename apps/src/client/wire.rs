//! What waits to be sent.

use std::{
    io::{self, Write},
    net::TcpStream,
};

/// Bytes for a connection that may not take them yet: while a guest is away, nobody reads.
#[derive(Debug, Default)]
pub(super) struct Wire {
    bytes: Vec<u8>,
    sent: usize,
}

impl Wire {
    pub(super) fn queue(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Sends what the connection takes without waiting.
    pub(super) fn flush(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => self.sent += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}
