//! Any bytes on the line between a host and a device, raw and as whole frames of the session at hand.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thinkey_core::link::{
    Client, Device, Engine, MAX_BODY, MAX_FRAME, VERSION,
    engine::Step,
    frame::{self, Decoder, Header},
    message::{
        self, Capabilities, Code, End, Ending, Failure, Greeting, Hello, Snapshot, Start, Stats, ToDevice, ToHost,
    },
    reliable::Timing,
};

/// Three tokens for every prompt, and a snapshot of a hundred bytes.
#[derive(Default)]
struct Short {
    left: u32,
    runs: bool,
    restored: usize,
}

impl Engine for Short {
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities::default()
    }
    fn start(&mut self, start: &Start<'_>) -> Result<(), Failure> {
        assert!(!self.runs, "two at a time");
        if start.max_tokens == 0 {
            return Err(Failure::new(Code::Context, "none"));
        }
        self.left = start.max_tokens.min(3);
        Ok(())
    }
    fn prompt(&mut self, _: &[u8]) -> Result<(), Failure> {
        Ok(())
    }
    fn begin(&mut self) -> Result<(), Failure> {
        self.runs = true;
        Ok(())
    }
    fn step(&mut self) -> Result<Step<'_>, Failure> {
        assert!(self.runs, "a step of nothing");
        if self.left == 0 {
            self.runs = false;
            let end = End::MaxTokens;
            return Ok(Step::Ended(Ending { end, prompt_tokens: 0, new_tokens: 0, prefill_us: 0, decode_us: 0 }));
        }
        self.left -= 1;
        Ok(Step::Token { token: self.left, text: b"x" })
    }
    fn cancel(&mut self) {
        self.left = 0;
    }
    fn stats(&self) -> Stats {
        Stats::default()
    }
    fn save(&mut self) -> Result<(), Failure> {
        Ok(())
    }
    fn saved(&mut self) -> Result<Option<Snapshot>, Failure> {
        Ok(Some(Snapshot { bytes: 100, checksum: 0 }))
    }
    fn read_snapshot(&mut self, _: u32, out: &mut [u8]) -> usize {
        out.len()
    }
    fn restore(&mut self, _: Snapshot) -> Result<(), Failure> {
        self.restored = 0;
        Ok(())
    }
    fn write_snapshot(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.restored += bytes.len();
        Ok(())
    }
    fn restored(&mut self) -> Result<Option<u32>, Failure> {
        Ok(Some(0))
    }
}

fn drain(device: &mut Device<Short>, now: u64) -> Vec<u8> {
    let (mut all, mut memory) = (Vec::new(), [0; 300]);
    for _ in 0..64 {
        while device.poll(now) {}
        match device.transmit(now, &mut memory) {
            0 => break,
            len => all.extend_from_slice(&memory[..len]),
        }
    }
    all
}

fn framed(session: u32, header: Header, body: &[u8]) -> Vec<u8> {
    frame::encode(session, header, body, &mut [0; MAX_FRAME]).expect("bodies are short").to_vec()
}

fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::new();
    let mut rest = data;
    while let Some(found) = decoder.next(0, 100, &mut rest) {
        let _ = found.of(0);
    }
    let _ = message::decode::<Greeting<'_>>(data);
    let _ = message::decode::<ToDevice<'_>>(data);
    let _ = message::decode::<ToHost<'_>>(data);

    // A session that began as it should, in which the other side says anything.
    let mut device = Device::new(Short::default(), 1, Timing::default(), 0);
    let hello =
        message::body(&Greeting::Hello(Hello { version: VERSION, client: 7, attempt: 0 })).expect("it is short");
    device.receive(0, &framed(0, Header::default(), &hello));
    let welcome = drain(&mut device, 0);
    let mut client = Client::new(7, Timing::default());
    let _ = client.transmit(0, &mut [0; 300]);
    client.receive(0, &welcome, &mut |_| true);
    let session = device.link().session();
    assert!(session != 0 && client.is_connected());

    let (mut now, mut sequence, mut rest) = (0, 0u16, data);
    while let Some((&[kind, len], tail)) = rest.split_first_chunk::<2>() {
        let (piece, tail) = tail.split_at(usize::from(len).min(MAX_BODY).min(tail.len()));
        rest = tail;
        now += u64::from(kind >> 3) * 20;
        let header = Header { sequence, acknowledged: u16::from(kind >> 4) };
        let bytes = match kind % 4 {
            0 => piece.to_vec(),
            1 => framed(0, Header::default(), piece),
            _ => framed(session, header, piece),
        };
        sequence = sequence.wrapping_add(u16::from(kind % 4 > 1));
        device.receive(now, &bytes);
        let said = drain(&mut device, now);
        client.receive(now, &bytes, &mut |_| kind % 8 != 7);
        client.receive(now, &said, &mut |_| true);
        let _ = client.transmit(now, &mut [0; 300]);
    }
});
