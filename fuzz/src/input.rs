//! A fuzzer's bytes as a program: what a target reads its decisions from.
//!
//! Every reading succeeds: behind the end there are zeros. So any bytes are a program, a longer one is
//! a continuation, and seeds can be written by hand with [`Program`].

/// Reads decisions from the front of some bytes.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    left: &'a [u8],
}

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { left: bytes }
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.take(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    /// The next two, little-endian, as all numbers here.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `end`, which is not zero, from one byte.
    pub fn below(&mut self, end: u8) -> u8 {
        self.u8() % end
    }

    /// So many bytes, or as many as there are.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, left) = self.left.split_at(most.min(self.left.len()));
        self.left = left;
        taken
    }

    /// Bytes behind their length, which has two bytes itself.
    pub fn block(&mut self) -> &'a [u8] {
        let length = self.u16();
        self.take(length.into())
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }
}

/// Writes what [`Input`] reads.
#[derive(Clone, Debug, Default)]
pub struct Program(Vec<u8>);

impl Program {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes as they are.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds a byte.
    #[must_use]
    pub fn u8(self, byte: u8) -> Self {
        self.bytes(&[byte])
    }

    /// Adds two bytes.
    #[must_use]
    pub fn u16(self, number: u16) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    /// Adds four bytes.
    #[must_use]
    pub fn u32(self, number: u32) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    /// Adds eight bytes.
    #[must_use]
    pub fn u64(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    /// Adds a block: what is beyond 65,535 bytes is left out.
    #[must_use]
    pub fn block(self, bytes: &[u8]) -> Self {
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.u16(length).bytes(&bytes[..length.into()])
    }

    /// The bytes.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let program = Program::new().u8(1).u16(2).u32(3).u64(4).block(b"five").bytes(b"six");
        let bytes = program.finish();
        let mut input = Input::new(&bytes);
        assert_eq!((input.u8(), input.u16(), input.u32(), input.u64()), (1, 2, 3, 4));
        assert_eq!((input.block(), input.rest()), (&b"five"[..], &b"six"[..]));
        assert!(input.is_empty());
        assert_eq!((input.u8(), input.u64(), input.block()), (0, 0, &[][..]));
    }

    #[test]
    fn what_is_cut_off_is_filled_up() {
        let mut input = Input::new(&[1]);
        assert_eq!(input.u32(), 1);
        let mut input = Input::new(&[200, 0, 7]);
        assert_eq!(input.block(), [7]);
    }
}
