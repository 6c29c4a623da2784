//! Any bytes as a trace: read, and replayed where what they ask for is small.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thinkey_core::{
    Plain,
    trace::{self, Needs, Record, TraceReader, Work},
    wire,
};

/// Floats that a replay may take: a fuzzer that waits for attention over many tokens finds nothing.
const MOST: usize = 1 << 16;

/// Frames with lengths and checks that fit, since those are not guessed: a piece of `data` for each.
fn framed(data: &[u8]) -> Vec<u8> {
    let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
    let mut bytes = Vec::new();
    let mut rest = data;
    while let Some((&len, tail)) = rest.split_first_chunk::<2>() {
        let (body, tail) = tail.split_at(usize::from(u16::from_le_bytes(len)).min(tail.len()));
        bytes.extend(((body.len() + 4) as u16).to_le_bytes());
        bytes.extend(body);
        bytes.extend(crc.checksum(body).to_le_bytes());
        rest = tail;
    }
    bytes
}

fn read(bytes: &[u8]) {
    let Ok(reader) = TraceReader::open(bytes) else { return };
    let (header, mut records, mut needs) = (*reader.header(), reader, Needs::default());
    while let Ok(Some(record)) = records.read() {
        if let Record::Head { layout, .. } = record
            && let Ok(head) = Needs::of(&header, &layout)
        {
            needs = needs.max(head);
        }
    }
    if needs.floats.max(needs.words) <= MOST && header.steps < 64 {
        let (mut floats, mut words, mut pages) = (vec![0.0; needs.floats], vec![0; needs.words], vec![0; needs.pages]);
        let mut work = Work { floats: &mut floats, words: &mut words, pages: &mut pages };
        let _ = trace::replay(&Plain, reader, 1e-4, &mut work);
    }
}

fuzz_target!(|data: &[u8]| {
    read(data);
    read(&framed(data));
    let _ = wire::decode::<Record<'_>>(data);
});
