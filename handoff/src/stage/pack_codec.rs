//! Variable-length integers of a batch: seven bits a byte, low first, shortest form only.

use super::pack::BatchError;

/// Bytes that the largest integer takes.
pub(super) const MAX_VARINT_BYTES: usize = 10;

/// Appends `value`.
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends the way from `from` to `to`: short when they are near, whichever is larger.
pub(super) fn put_delta(out: &mut Vec<u8>, from: u64, to: u64) {
    let delta = to.wrapping_sub(from) as i64;
    put_varint(out, (delta << 1 ^ delta >> 63) as u64);
}

/// Reads what the functions above wrote; knows where it is, for errors.
pub(super) struct Cursor<'a> {
    body: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(body: &'a [u8]) -> Self {
        Self { body, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.body.get(self.at..).unwrap_or_default()
    }

    pub(super) fn byte(&mut self) -> Result<u8, BatchError> {
        let byte = *self.body.get(self.at).ok_or(BatchError::Truncated { at: self.at })?;
        self.at += 1;
        Ok(byte)
    }

    pub(super) fn u32_le(&mut self) -> Result<u32, BatchError> {
        let bytes = self.rest().first_chunk::<4>().ok_or(BatchError::Truncated { at: self.at })?;
        self.at += 4;
        Ok(u32::from_le_bytes(*bytes))
    }

    pub(super) fn varint(&mut self) -> Result<u64, BatchError> {
        let start = self.at;
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            let lost = shift == 63 && bits > 1;
            let padded = byte == 0 && shift > 0;
            if lost || padded {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(BatchError::Varint { at: start })
    }

    pub(super) fn delta(&mut self, from: u64) -> Result<u64, BatchError> {
        let coded = self.varint()?;
        let delta = (coded >> 1) as i64 ^ -((coded & 1) as i64);
        Ok(from.wrapping_add(delta as u64))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(a: u64, b: u64, shift in 0u32..64) {
            for (from, to) in [(a, b), (a, a.wrapping_add(b >> shift)), (b >> shift, a >> shift)] {
                let mut out = Vec::new();
                put_varint(&mut out, from);
                prop_assert!(out.len() <= MAX_VARINT_BYTES);
                put_delta(&mut out, from, to);
                let mut cursor = Cursor::new(&out);
                prop_assert_eq!(cursor.varint().unwrap(), from);
                prop_assert_eq!(cursor.delta(from).unwrap(), to);
                prop_assert!(cursor.rest().is_empty());
            }
        }

        #[test]
        fn one_form_only(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let mut cursor = Cursor::new(&bytes);
            if let Ok(value) = cursor.varint() {
                let mut out = Vec::new();
                put_varint(&mut out, value);
                prop_assert_eq!(&bytes[..cursor.at()], &out[..]);
            }
        }
    }

    #[test]
    fn near_is_short() {
        let mut out = Vec::new();
        put_delta(&mut out, 1_000_000, 1_000_063);
        put_delta(&mut out, 1_000_000, 999_937);
        assert_eq!(out.len(), 2);
        for overlong in [&[0x80, 0x00][..], &[0xff; 10], &[0x80; 11]] {
            assert!(Cursor::new(overlong).varint().is_err(), "{overlong:?}");
        }
    }
}
