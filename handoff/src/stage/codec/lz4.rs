//! LZ4: one block.

use std::io;

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

pub(in super::super) struct Encoder {
    table: CompressTable,
}

impl Encoder {
    pub(in super::super) fn new() -> Self {
        Self { table: CompressTable::large() }
    }

    pub(in super::super) fn encode(&mut self, body: &[u8], into: &mut Vec<u8>) -> io::Result<bool> {
        // Not cleared first: only what is beyond the last payload must be made zero.
        into.resize(get_maximum_output_size(body.len()), 0);
        let len = compress_into_with_table(body, into, &mut self.table).map_err(super::invalid)?;
        into.truncate(len);
        Ok(len < body.len())
    }
}

pub(in super::super) fn decode(payload: &[u8], len: usize, into: &mut Vec<u8>) -> io::Result<()> {
    into.resize(len, 0);
    let actual = decompress_into(payload, into).map_err(super::invalid)?;
    into.truncate(actual);
    Ok(())
}
