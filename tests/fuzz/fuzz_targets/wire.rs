//! Any bytes as what is stored or sent: headers, layouts, masks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thinkey_core::{
    ChannelMask, HeadLayout, Policy,
    wire::{self, CacheHeader},
};

fn read(bytes: &[u8]) {
    let _ = wire::decode::<ChannelMask>(bytes);
    if let Ok(layout) = wire::decode::<HeadLayout>(bytes)
        && layout.check().is_ok()
    {
        let _ = layout.bytes();
    }
    if let Ok(plan) = wire::decode::<CacheHeader>(bytes).and_then(|header| header.plan()) {
        let _ = plan.bytes(|_, _| 1);
    }
}

fuzz_target!(|data: &[u8]| {
    read(data);
    // With a check that fits, since that is not guessed.
    let sum = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(data);
    read(&[data, &sum.to_le_bytes()].concat());
    if let Ok(text) = core::str::from_utf8(data) {
        let _ = text.parse::<Policy>();
    }
});
