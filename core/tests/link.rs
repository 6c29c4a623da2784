//! A client and a device over a line that loses, flips, repeats and delays bytes and is cut: nothing wrong comes through,
//! nothing accepted is lost, and nothing hangs.
#![allow(missing_docs, reason = "tests")]

use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use thinkey_core::link::{
    Client, Device, Engine, VERSION,
    client::Event,
    engine::Step,
    frame::{self, Header},
    message::{Capabilities, Code, End, Ending, Failure, MAX_CHUNK, Snapshot, Start, Stats, ToHost},
    reliable::Timing,
};

const TIMING: Timing = Timing { retransmit: 50, retransmit_most: 400, half_frame: 30, silence: 120 };

/// The token that answers `prompt` at place `at`.
fn token(prompt: &[u8], at: u32) -> u32 {
    prompt.iter().fold(at.wrapping_mul(0x9e37_79b9), |sum, &byte| sum.rotate_left(5) ^ u32::from(byte))
}

fn text(token: u32) -> Vec<u8> {
    token.to_string().into_bytes()
}

fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(7, |sum: u32, &byte| sum.wrapping_mul(31) ^ u32::from(byte))
}

/// An engine whose answers are a function of the prompt.
#[derive(Debug, Default)]
struct Mock {
    prompt: Vec<u8>,
    most: u32,
    at: u32,
    running: bool,
    cancelled: bool,
    text: Vec<u8>,
    snapshot: Vec<u8>,
    /// Polls until a snapshot is made or taken.
    patience: u32,
    incoming: Vec<u8>,
    expected: Snapshot,
    log: Vec<Vec<u8>>,
}

impl Engine for Mock {
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { model: "mock", context: 1000, policy: "full", ..Capabilities::default() }
    }

    fn start(&mut self, start: &Start<'_>) -> Result<(), Failure> {
        assert!(!self.running, "one at a time");
        if start.policy == "bad" {
            return Err(Failure::new(Code::Policy, "bad"));
        }
        self.prompt.clear();
        (self.most, self.at, self.cancelled) = (start.max_tokens, 0, false);
        Ok(())
    }

    fn prompt(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.prompt.extend_from_slice(bytes);
        Ok(())
    }

    fn begin(&mut self) -> Result<(), Failure> {
        self.running = true;
        Ok(())
    }

    fn step(&mut self) -> Result<Step<'_>, Failure> {
        assert!(self.running, "a completion is under way");
        if self.cancelled || self.at == self.most {
            self.running = false;
            let end = if self.cancelled { End::Cancelled } else { End::MaxTokens };
            let prompt_tokens = self.prompt.len() as u32;
            self.log.push(self.prompt.clone());
            return Ok(Step::Ended(Ending { end, prompt_tokens, new_tokens: self.at, prefill_us: 0, decode_us: 0 }));
        }
        let token = token(&self.prompt, self.at);
        self.at += 1;
        self.text = text(token);
        Ok(Step::Token { token, text: &self.text })
    }

    fn cancel(&mut self) {
        self.cancelled = true;
    }

    fn stats(&self) -> Stats {
        Stats { tokens: self.prompt.len() as u32 + self.at, ..Stats::default() }
    }

    fn save(&mut self) -> Result<(), Failure> {
        self.patience = 3;
        Ok(())
    }

    fn saved(&mut self) -> Result<Option<Snapshot>, Failure> {
        if self.patience > 0 {
            self.patience -= 1;
            return Ok(None);
        }
        let pattern = (0..3000_u32).flat_map(|number| token(&self.prompt, number).to_le_bytes());
        self.snapshot = pattern.collect();
        Ok(Some(Snapshot { bytes: self.snapshot.len() as u32, checksum: checksum(&self.snapshot) }))
    }

    fn read_snapshot(&mut self, offset: u32, out: &mut [u8]) -> usize {
        let rest = &self.snapshot[offset as usize..];
        let len = rest.len().min(out.len());
        out[..len].copy_from_slice(&rest[..len]);
        len
    }

    fn restore(&mut self, snapshot: Snapshot) -> Result<(), Failure> {
        self.incoming.clear();
        self.expected = snapshot;
        Ok(())
    }

    fn write_snapshot(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.incoming.extend_from_slice(bytes);
        Ok(())
    }

    fn restored(&mut self) -> Result<Option<u32>, Failure> {
        if self.patience < 3 {
            self.patience += 1;
            return Ok(None);
        }
        if checksum(&self.incoming) != self.expected.checksum {
            return Err(Failure::new(Code::Damaged, "the snapshot is damaged"));
        }
        Ok(Some(self.incoming.len() as u32))
    }
}

/// A small generator, so that a schedule is one number.
#[derive(Clone, Debug)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % sides
    }

    /// Once in `times`, if that is not 0.
    fn once(&mut self, times: u64) -> bool {
        times > 0 && self.roll(times) == 0
    }
}

/// How often what goes wrong: once in so many bytes or rounds, 0 for never.
#[derive(Clone, Copy, Debug)]
struct Faults {
    lose: u64,
    flip: u64,
    repeat: u64,
    delay: u64,
    cut: u64,
    lazy: u64,
}

fn faults() -> impl Strategy<Value = Faults> {
    // Rarer than once in a frame, or none of the longest comes through.
    let rate = |range: std::ops::Range<u64>| prop_oneof![Just(0), range];
    (rate(400..5000), rate(400..5000), rate(5..100), rate(5..60), rate(20..400), rate(2..10))
        .prop_map(|(lose, flip, repeat, delay, cut, lazy)| Faults { lose, flip, repeat, delay, cut, lazy })
}

/// One direction of the line: pieces of bytes and when they arrive. Pieces may overtake each other.
#[derive(Debug, Default)]
struct Line(VecDeque<(u64, Vec<u8>)>);

impl Line {
    fn carry(&mut self, now: u64, bytes: &[u8], faults: &Faults, dice: &mut Dice) {
        let mut piece = Vec::new();
        for &byte in bytes {
            if dice.once(faults.lose) {
                continue;
            }
            piece.push(if dice.once(faults.flip) { byte ^ (1 << dice.roll(8)) } else { byte });
        }
        let arrives = now + if dice.once(faults.delay) { dice.roll(300) } else { 1 };
        if dice.once(faults.repeat) {
            self.0.push_back((now + dice.roll(500), piece.clone()));
        }
        self.0.push_back((arrives, piece));
    }

    fn arrived(&mut self, now: u64) -> Vec<u8> {
        let (here, later): (Vec<_>, _) = self.0.drain(..).partition(|(at, _)| *at <= now);
        self.0 = later.into();
        here.into_iter().flat_map(|(_, piece)| piece).collect()
    }
}

/// What the host knows of a request.
#[derive(Debug, Default)]
struct Request {
    prompt: Vec<u8>,
    sent: usize,
    accepted: bool,
    most: u32,
    /// Tokens after which it is cancelled.
    cancel: Option<u32>,
    cancel_said: bool,
    tokens: Vec<u32>,
    end: Option<End>,
}

struct World {
    now: u64,
    client: Client,
    device: Device<Mock>,
    up: Line,
    down: Line,
    dice: Dice,
    faults: Faults,
    connected: u32,
    requests: BTreeMap<u16, Request>,
    snapshot: Option<Snapshot>,
    chunks: Vec<u8>,
    restored: Option<u32>,
    health: u32,
}

impl World {
    fn new(faults: Faults, seed: u64) -> Self {
        Self {
            now: 0,
            client: Client::new(seed as u32, TIMING),
            device: Device::new(Mock::default(), 1, TIMING, 0),
            up: Line::default(),
            down: Line::default(),
            dice: Dice(seed),
            faults,
            connected: 0,
            requests: BTreeMap::new(),
            snapshot: None,
            chunks: Vec::new(),
            restored: None,
            health: 0,
        }
    }

    /// A millisecond passes.
    fn round(&mut self) {
        let Self { now, client, device, up, down, dice, faults, .. } = self;
        *now += 1;
        if dice.once(faults.cut) {
            // What is on the line is gone, but for the first bytes of it.
            for line in [&mut *up, &mut *down] {
                let kept = dice.roll(20) as usize;
                let mut rest = line.arrived(u64::MAX);
                rest.truncate(kept);
                line.0.push_back((*now, rest));
            }
            client.reconnect();
            if dice.once(2) {
                device.reconnect();
            }
        }
        let mut memory = [0; 400];
        let room = 1 + dice.roll(400) as usize;
        let len = client.transmit(*now, &mut memory[..room]);
        up.carry(*now, &memory[..len], faults, dice);
        let came = up.arrived(*now);
        device.receive(*now, &came);
        while device.poll(*now) {
            if dice.once(3) {
                break;
            }
        }
        let len = device.transmit(*now, &mut memory[..room]);
        down.carry(*now, &memory[..len], faults, dice);
        let came = down.arrived(*now);
        let lazy = faults.lazy > 0 && dice.roll(faults.lazy) != 0;
        let (requests, chunks) = (&mut self.requests, &mut self.chunks);
        let (connected, snapshot, restored, health) =
            (&mut self.connected, &mut self.snapshot, &mut self.restored, &mut self.health);
        client.receive(*now, &came, &mut |event| {
            match event {
                Event::Connected(capabilities) => {
                    assert_eq!(capabilities.model, "mock");
                    *connected += 1;
                }
                Event::Restarted | Event::Version { .. } => panic!("{event:?}"),
                Event::Message(_) if lazy => return false,
                Event::Message(ToHost::Accepted { request }) => {
                    let request = requests.get_mut(&request).unwrap();
                    assert!(!request.accepted);
                    request.accepted = true;
                }
                Event::Message(ToHost::Token { request, token: got, text: shown }) => {
                    let request = requests.get_mut(&request).unwrap();
                    assert!(request.end.is_none());
                    assert_eq!(got, token(&request.prompt, request.tokens.len() as u32), "the right token");
                    assert_eq!(shown, text(got));
                    request.tokens.push(got);
                }
                Event::Message(ToHost::Ended { request, ending }) => {
                    let request = requests.get_mut(&request).unwrap();
                    assert_eq!(request.end.replace(ending.end), None, "ends once");
                    assert_eq!(ending.new_tokens, request.tokens.len() as u32);
                }
                Event::Message(ToHost::Snapshot(found)) => *snapshot = Some(found),
                Event::Message(ToHost::Chunk { bytes }) => chunks.extend_from_slice(bytes),
                Event::Message(ToHost::Restored { tokens }) => *restored = Some(tokens),
                Event::Message(ToHost::Health(_)) => *health += 1,
                Event::Message(message) => panic!("{message:?}"),
            }
            true
        });
        if !lazy {
            client.resume();
        }
        for (&number, request) in requests.iter_mut() {
            if request.accepted && request.end.is_none() && request.sent < request.prompt.len() {
                request.sent += client.prompt(number, &request.prompt[request.sent..]);
            }
            let ripe = request.cancel.is_some_and(|after| request.tokens.len() as u32 >= after);
            if ripe && request.end.is_none() && !request.cancel_said {
                request.cancel_said = client.cancel(number).is_ok();
            }
        }
    }

    /// Rounds until `done`, or too many for a line that works at all.
    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        for _ in 0..400_000 {
            if done(self) {
                return;
            }
            self.round();
        }
        panic!("{what}: hangs at {} with {:?}; {:?} {:?}", self.now, self.faults, self.client, self.device.link());
    }
}

#[derive(Clone, Debug)]
struct Asked {
    prompt: Vec<u8>,
    tokens: u32,
    cancel: Option<u32>,
}

fn asked() -> impl Strategy<Value = Asked> {
    let cancel = prop_oneof![3 => Just(None), 1 => (0u32..30).prop_map(Some)];
    (prop::collection::vec(any::<u8>(), 0..700), 0u32..60, cancel).prop_map(|(prompt, tokens, cancel)| Asked {
        prompt,
        tokens,
        cancel,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_the_line_does(
        faults in faults(),
        seed in any::<u64>(),
        script in prop::collection::vec(asked(), 1..5),
        snapshot in prop::bool::weighted(0.2),
    ) {
        let mut world = World::new(faults, seed);
        for Asked { prompt, tokens, cancel } in script {
            world.until("room", |world| world.client.is_connected() && world.client.link().room() > 0);
            let start = Start {
                prompt_bytes: prompt.len() as u32,
                form: Default::default(),
                append: false,
                max_tokens: tokens,
                sampling: Default::default(),
                policy: "",
            };
            let number = world.client.start(&start).unwrap();
            world.requests.insert(number, Request { prompt, most: tokens, cancel, ..Request::default() });
        }
        world.until("answers", |world| world.requests.values().all(|request| request.end.is_some()));
        prop_assert!(world.client.open().is_empty());
        for request in world.requests.values() {
            match request.end {
                Some(End::MaxTokens) => prop_assert_eq!(request.tokens.len() as u32, request.most),
                end => prop_assert!(end == Some(End::Cancelled) && request.cancel_said),
            }
        }
        if snapshot {
            world.client.save().unwrap();
            world.until("a snapshot", |world| world.snapshot.is_some_and(|snapshot| snapshot.bytes as usize <= world.chunks.len()));
            let saved = world.snapshot.unwrap();
            prop_assert_eq!(checksum(&world.chunks), saved.checksum);
            world.until("room", |world| world.client.link().room() > 0);
            world.client.restore(saved).unwrap();
            let (chunks, mut sent) = (world.chunks.clone(), 0);
            while sent < chunks.len() {
                sent += world.client.chunk(&chunks[sent..]);
                world.round();
            }
            world.until("a restored snapshot", |world| world.restored.is_some());
            prop_assert_eq!(world.restored, Some(saved.bytes));
        }
        world.until("room", |world| world.client.link().room() > 0);
        world.client.health().unwrap();
        world.until("health", |world| world.health == 1);
        world.until("silence", |world| !world.client.waits());
        prop_assert_eq!(world.connected, 1, "one session for all of it");
    }

    /// Neither side panics at anything.
    #[test]
    fn noise(bytes in prop::collection::vec(any::<u8>(), 0..600), seed in any::<u64>()) {
        let none = Faults { lose: 0, flip: 0, repeat: 0, delay: 0, cut: 0, lazy: 0 };
        let mut world = World::new(none, seed);
        world.until("a session", |world| world.client.is_connected());
        world.device.receive(world.now, &bytes);
        world.client.receive(world.now, &bytes, &mut |event| panic!("{event:?}"));
        world.client.health().unwrap();
        world.until("health", |world| world.health == 1);
        prop_assert!(world.now < 200, "within a retransmission or two");
    }
}

const QUIET: Faults = Faults { lose: 0, flip: 0, repeat: 0, delay: 0, cut: 0, lazy: 0 };

fn start(prompt_bytes: u32, max_tokens: u32, policy: &str) -> Start<'_> {
    let (form, sampling) = Default::default();
    Start { prompt_bytes, form, append: false, max_tokens, sampling, policy }
}

/// Rounds by hand: what the client hears.
fn hear(world: &mut World, rounds: u32) -> Vec<String> {
    let mut heard = Vec::new();
    for _ in 0..rounds {
        world.now += 1;
        let mut memory = [0; 4096];
        let len = world.client.transmit(world.now, &mut memory);
        world.device.receive(world.now, &memory[..len]);
        while world.device.poll(world.now) {}
        let len = world.device.transmit(world.now, &mut memory);
        world.client.receive(world.now, &memory[..len], &mut |event| {
            heard.push(match event {
                Event::Message(ToHost::Token { .. }) => "token".to_owned(),
                Event::Message(ToHost::Failed { request, code, .. }) => format!("{request:?} {code:?}"),
                Event::Message(ToHost::Log { bytes }) => format!("log {}", bytes.len()),
                Event::Message(ToHost::Ended { ending, .. }) => format!("{:?}", ending.end),
                Event::Message(_) => "message".to_owned(),
                Event::Connected(_) => "connected".to_owned(),
                event => format!("{event:?}"),
            });
            true
        });
    }
    heard
}

#[test]
fn a_device_that_was_switched_off_is_noticed() {
    let mut world = World::new(QUIET, 3);
    assert_eq!(hear(&mut world, 3), ["connected"]);
    world.client.start(&start(0, 1_000_000, "")).unwrap();
    hear(&mut world, 5);
    world.device = Device::new(Mock::default(), 2, TIMING, world.now);
    let heard = hear(&mut world, 200);
    assert_eq!(heard, ["Restarted", "connected"]);
    assert!(world.client.open().is_empty() && !world.client.waits());
}

/// A host of a later version, whose hello has a field more, is told the device's, once.
#[test]
fn another_version_is_told() {
    let mut device = Device::new(Mock::default(), 1, TIMING, 0);
    let (mut line, mut memory) = ([0; 64], [0; 400]);
    device.receive(0, frame::encode(0, Header::default(), &[0, VERSION as u8 + 1, 7, 0, 99], &mut line).unwrap());
    let len = device.transmit(0, &mut memory);
    let mut client = Client::new(7, TIMING);
    let _ = client.transmit(0, &mut [0; 400]);
    let mut heard = Vec::new();
    for _ in 0..2 {
        client.receive(0, &memory[..len], &mut |event| {
            heard.push(format!("{event:?}"));
            true
        });
    }
    assert_eq!(heard, [format!("Version {{ device: {VERSION} }}")]);
    assert!(!client.is_connected() && device.link().session() == 0);
}

#[test]
fn another_host_ends_what_the_last_asked_for() {
    let mut world = World::new(QUIET, 3);
    hear(&mut world, 3);
    world.client.start(&start(0, 1_000_000, "")).unwrap();
    assert!(hear(&mut world, 20).contains(&"token".to_owned()));
    world.client = Client::new(99, TIMING);
    hear(&mut world, 5);
    world.client.start(&start(0, 2, "")).unwrap();
    assert_eq!(hear(&mut world, 20), ["message", "token", "token", "MaxTokens"]);
    assert_eq!(world.device.engine().log.len(), 2, "both came to an end");
}

#[test]
fn refusals_have_codes() {
    let mut world = World::new(QUIET, 3);
    hear(&mut world, 3);
    world.client.start(&start(0, 1, "bad")).unwrap();
    assert_eq!(hear(&mut world, 5), ["Some(0) Policy"]);
    // Four wait for their turn, and then the first of them for its prompt.
    (0..6).for_each(|request| assert_eq!(world.client.start(&start(9, 1, "")), Ok(request + 1)));
    let heard = hear(&mut world, 5);
    assert_eq!(heard, ["Some(5) Busy", "Some(6) Busy", "message"]);
    world.client.save().unwrap();
    assert_eq!(hear(&mut world, 5), ["None Busy"]);
    assert_eq!(world.client.prompt(1, &[0; 10]), 10);
    assert_eq!(hear(&mut world, 5), ["Some(1) Protocol", "message"]);
    assert!(world.client.start(&start(0, 1, &"x".repeat(300))).is_err(), "longer than a message");
}

/// A host that does not read stops the engine, and gets every token when it reads again.
#[test]
fn a_slow_reader_stops_the_engine() {
    let mut world = World::new(QUIET, 3);
    hear(&mut world, 3);
    world.client.start(&start(0, 300, "")).unwrap();
    let mut memory = [0; 4096];
    for _ in 0..1000 {
        world.now += 1;
        let len = world.client.transmit(world.now, &mut memory);
        world.device.receive(world.now, &memory[..len]);
        while world.device.poll(world.now) {}
        world.device.transmit(world.now, &mut memory);
    }
    assert!(world.device.engine().at < 20, "{}", world.device.engine().at);
    world.requests.clear();
    let heard = hear(&mut world, 2000);
    assert_eq!(heard.iter().filter(|event| *event == "token").count(), 300);
}

#[test]
fn a_log_goes_where_there_is_room_and_is_counted_where_there_is_none() {
    let mut world = World::new(QUIET, 3);
    // Frames of 300 bytes: three fit, and none is cut.
    (1..=5).for_each(|frame| world.device.log(&[frame; 300]));
    assert_eq!(world.device.log_room(), 1024 - 900);
    let (mut log, mut lost) = (Vec::new(), None);
    for _ in 0..40 {
        world.now += 1;
        let mut memory = [0; 4096];
        let len = world.client.transmit(world.now, &mut memory);
        world.device.receive(world.now, &memory[..len]);
        while world.device.poll(world.now) {}
        let len = world.device.transmit(world.now, &mut memory);
        let mut connected = false;
        world.client.receive(world.now, &memory[..len], &mut |event| {
            match event {
                Event::Message(ToHost::Log { bytes }) => {
                    assert!(bytes.len() <= MAX_CHUNK);
                    log.extend_from_slice(bytes);
                }
                Event::Message(ToHost::Health(health)) => lost = Some(health.lost_log),
                event => connected |= matches!(event, Event::Connected(_)),
            }
            true
        });
        if connected {
            world.client.health().unwrap();
        }
    }
    assert_eq!(log, [[1; 300], [2; 300], [3; 300]].concat());
    assert_eq!((lost, world.device.log_room()), (Some(600), 1024));
}
