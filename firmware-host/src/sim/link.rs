//! A host and a device on a line on which things go wrong, in a time of their own.
//!
//! Both ends are those of a real line, [`Client`] and [`Device`]; only the line, the clock and the power are made up. So what
//! is found here is found of what runs on a board.

use super::wire::{Faults, Wire};
use fastrand::Rng;
use serde::{Deserialize, Serialize};
use thinkey_core::link::{
    Client, Device, Engine,
    client::Event,
    engine::Step,
    message::{Capabilities, Code, End, Ending, Failure, Form, Sampling, Snapshot, Start, Stats, ToHost},
    reliable::Timing,
};

/// Milliseconds between two looks of either side at the line.
const TICK: u64 = 2;

/// Bytes that either side hands to the line at a time.
const PIECE: usize = 512;

/// An engine whose time is that of the simulation.
pub trait Timed: Engine {
    /// It is `now`, in milliseconds.
    fn at(&mut self, now: u64);
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// When, at the earliest, in milliseconds.
    pub at: u64,
    /// The prompt.
    pub prompt: Vec<u8>,
    /// Tokens of the answer.
    pub tokens: u32,
    /// After how many the host has enough.
    pub cancel: Option<u32>,
}

/// What goes wrong, and for how long.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Weather {
    /// On the way to the device.
    pub to_device: Faults,
    /// On the way to the host.
    pub to_host: Faults,
    /// Times of power cuts, in milliseconds.
    pub power: Vec<u64>,
    /// How long the device stays off.
    pub off: u64,
    /// Share of messages that the host leaves on the line at first.
    pub balks: f64,
    /// When all that ends.
    pub until: u64,
}

/// What the host heard of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Heard {
    /// Tokens since it was last asked.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: Vec<u8>,
    /// How often it was asked.
    pub asked: u32,
    /// When the first token came, in milliseconds.
    pub first: Option<u64>,
    /// When it ended.
    pub ended: Option<u64>,
    /// Whether the host had enough.
    pub cancelled: bool,
    /// The stable number of the [`Code`] it failed with.
    pub failed: Option<u8>,
}

/// How a conversation went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Conversation {
    /// What was heard, by request.
    pub heard: Vec<Heard>,
    /// Sessions that the host saw end before their time.
    pub restarts: u32,
    /// Damaged frames, at both ends.
    pub damaged: u32,
    /// Frames sent again, by both ends.
    pub resent: u32,
    /// When all was said, in milliseconds; `None` where it was not in time.
    pub over: Option<u64>,
}

/// One request as the host keeps it.
struct Open<'a> {
    ask: &'a Ask,
    heard: Heard,
    /// The client's number for it while it is under way.
    number: Option<u16>,
    /// Bytes of the prompt that were sent; `None` until they may be.
    sent: Option<usize>,
    /// Not asked again before.
    not_before: u64,
    cancels: bool,
}

impl Open<'_> {
    /// Forgets an answer that will not be gone on with.
    fn again(&mut self, not_before: u64) {
        (self.number, self.sent, self.cancels) = (None, None, false);
        (self.heard.tokens, self.heard.text, self.heard.first) = (Vec::new(), Vec::new(), None);
        self.not_before = not_before;
    }
}

/// Has a host ask all of `asks`, as often as it takes, of a device whose engine is made by `engine` each time power comes on.
/// Nothing is random but by `seed`. Given up at the time `limit`.
pub fn converse<E: Timed>(
    asks: &[Ask],
    engine: &mut dyn FnMut() -> E,
    weather: &Weather,
    seed: u64,
    limit: u64,
) -> Conversation {
    let mut random = Rng::with_seed(seed);
    let timing = Timing::default();
    let mut boot = 1;
    let mut device = Device::new(engine(), boot, timing, 0);
    let mut client = Client::new(random.u32(..), timing);
    let mut wires = [&weather.to_device, &weather.to_host].map(|faults| Wire::new(faults.clone(), random.u64(..)));
    let mut open: Vec<Open<'_>> = asks
        .iter()
        .map(|ask| Open { ask, heard: Heard::default(), number: None, sent: None, not_before: ask.at, cancels: false })
        .collect();
    let mut told = Conversation::default();
    let (mut off_until, mut up, mut healed) = (0, true, false);
    let mut memory = [0; PIECE];
    let mut now = 0;
    while now < limit {
        if now >= weather.until && !healed {
            wires.iter_mut().for_each(Wire::heal);
            healed = true;
        }
        if weather.power.iter().any(|&at| at > now.saturating_sub(TICK) && at <= now) && now < weather.until {
            told.damaged += device.link().damaged();
            told.resent += device.link().resent();
            boot += 1;
            device = Device::new(engine(), boot, timing, now);
            off_until = now + weather.off;
            wires.iter_mut().for_each(Wire::clear);
        }
        let on = now >= off_until;
        let is_up = on && wires.iter().all(|wire| wire.is_up(now));
        if is_up && !up {
            device.reconnect();
            client.reconnect();
        }
        up = is_up;

        let [to_device, to_host] = &mut wires;
        if on {
            device.engine_mut().at(now);
            device.receive(now, &to_device.receive(now, usize::MAX));
            while device.poll(now) {}
            let len = device.transmit(now, &mut memory);
            to_host.send(now, &memory[..len]);
        }
        let arrived = to_host.receive(now, usize::MAX);
        let (mut balked, mut restarted) = (false, false);
        client.receive(now, &arrived, &mut |event| match event {
            Event::Message(message) => {
                balked |= now < weather.until && weather.balks > 0.0 && random.f64() < weather.balks;
                if !balked {
                    hear(&mut open, now, &message);
                }
                !balked
            }
            Event::Restarted => {
                restarted = true;
                true
            }
            _ => true,
        });
        if balked {
            client.resume();
        }
        if restarted {
            told.restarts += 1;
            open.iter_mut().filter(|open| open.number.is_some()).for_each(|open| open.again(now));
        }
        say(&mut open, now, &mut client);
        let len = client.transmit(now, &mut memory);
        to_device.send(now, &memory[..len]);
        if open.iter().all(|open| open.heard.ended.is_some()) {
            told.over = Some(now);
            break;
        }
        now += TICK;
    }
    told.damaged += device.link().damaged() + client.link().damaged();
    told.resent += device.link().resent() + client.link().resent();
    told.heard = open.into_iter().map(|open| open.heard).collect();
    told
}

/// What the host says: requests whose time has come, prompts of those that are accepted, and that it has enough.
fn say(open: &mut [Open<'_>], now: u64, client: &mut Client) {
    if !client.is_connected() {
        return;
    }
    for open in open {
        match (open.number, open.sent) {
            (None, _) if open.heard.ended.is_none() && now >= open.not_before => {
                let start = Start {
                    prompt_bytes: open.ask.prompt.len() as u32,
                    form: Form::Raw,
                    append: false,
                    max_tokens: open.ask.tokens,
                    sampling: Sampling::default(),
                    policy: "",
                };
                // Where there is no room now, there will be.
                if let Ok(number) = client.start(&start) {
                    open.number = Some(number);
                    open.heard.asked += 1;
                }
            }
            (Some(number), Some(sent)) if sent < open.ask.prompt.len() => {
                open.sent = Some(sent + client.prompt(number, &open.ask.prompt[sent..]));
            }
            _ => {}
        }
        let enough = open.ask.cancel.is_some_and(|most| open.heard.tokens.len() >= most as usize);
        if let Some(number) = open.number
            && enough
            && !open.cancels
        {
            open.cancels = client.cancel(number).is_ok();
        }
    }
}

fn find<'o, 'a>(open: &'o mut [Open<'a>], number: u16) -> Option<&'o mut Open<'a>> {
    open.iter_mut().find(|open| open.number == Some(number))
}

/// What the host makes of a message.
fn hear(open: &mut [Open<'_>], now: u64, message: &ToHost<'_>) {
    match *message {
        ToHost::Accepted { request } => {
            if let Some(open) = find(open, request) {
                open.sent = Some(0);
            }
        }
        ToHost::Token { request, token, text } => {
            if let Some(open) = find(open, request) {
                open.heard.first.get_or_insert(now);
                open.heard.tokens.push(token);
                open.heard.text.extend_from_slice(text);
            }
        }
        ToHost::Text { request, text } => {
            if let Some(open) = find(open, request) {
                open.heard.text.extend_from_slice(text);
            }
        }
        ToHost::Ended { request, ending } => {
            if let Some(open) = find(open, request) {
                open.number = None;
                open.heard.ended = Some(now);
                open.heard.cancelled = ending.end == End::Cancelled;
            }
        }
        ToHost::Failed { request: Some(request), code, .. } => {
            if let Some(open) = find(open, request) {
                if code == Code::Busy {
                    open.again(now + 50);
                } else {
                    open.number = None;
                    (open.heard.ended, open.heard.failed) = (Some(now), Some(code as u8));
                }
            }
        }
        _ => {}
    }
}

/// Token `index` of the answer to `prompt` by a [`Scripted`] engine.
#[must_use]
pub fn token(prompt: &[u8], index: usize) -> u32 {
    // FNV-1a, by which one other byte of the prompt makes other tokens.
    let bytes = prompt.iter().copied().chain(index.to_le_bytes());
    bytes.fold(0x811c_9dc5, |sum: u32, byte| (sum ^ u32::from(byte)).wrapping_mul(0x0100_0193)) >> 8
}

/// How long a [`Scripted`] engine takes, in milliseconds: for a prompt of so many tokens, and for a step over so many.
pub trait Pace {
    /// For a prompt.
    fn prompt(&self, tokens: usize) -> u64;
    /// For a step.
    fn step(&self, tokens: usize) -> u64;
    /// Whether there is memory for it at the time `now`.
    fn fits(&self, now: u64) -> bool {
        let _ = now;
        true
    }
}

/// An engine without weights, on whose line tokens can be checked: what it answers is a function of the prompt, and takes as long as is said.
#[derive(Clone, Debug)]
pub struct Scripted<P> {
    pace: P,
    model: String,
    context: u32,
    /// Tokens of a prompt, whatever its bytes are; one a byte where it is not said.
    prompt_tokens: Option<usize>,
    prompt: Vec<u8>,
    running: Option<Running>,
    now: u64,
    text: [u8; 8],
}

#[derive(Clone, Copy, Debug)]
struct Running {
    began: u64,
    due: u64,
    first: u64,
    done: usize,
    most: usize,
    cancelled: bool,
}

impl<P> Scripted<P> {
    /// An engine that calls itself `model` and holds `context` tokens.
    pub fn new(model: &str, context: u32, prompt_tokens: Option<usize>, pace: P) -> Self {
        let model = model.to_owned();
        Self { pace, model, context, prompt_tokens, prompt: Vec::new(), running: None, now: 0, text: [0; 8] }
    }
}

impl<P: Pace> Timed for Scripted<P> {
    fn at(&mut self, now: u64) {
        self.now = now;
    }
}

impl<P: Pace> Scripted<P> {
    fn read(&self) -> usize {
        self.prompt_tokens.unwrap_or(self.prompt.len())
    }
}

impl<P: Pace> Engine for Scripted<P> {
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities { model: &self.model, context: self.context, ..Capabilities::default() }
    }

    fn start(&mut self, start: &Start<'_>) -> Result<(), Failure> {
        self.prompt.clear();
        let (began, due, first, done) = (0, u64::MAX, 0, 0);
        self.running = Some(Running { began, due, first, done, most: start.max_tokens as usize, cancelled: false });
        Ok(())
    }

    fn prompt(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.prompt.extend_from_slice(bytes);
        Ok(())
    }

    fn begin(&mut self) -> Result<(), Failure> {
        let (read, now) = (self.read(), self.now);
        let due = now + self.pace.prompt(read);
        if let Some(running) = &mut self.running {
            if read + running.most > self.context as usize {
                self.running = None;
                return Err(Failure::new(Code::Context, "prompt and answer are longer than the context"));
            }
            (running.began, running.due) = (now, due);
        }
        Ok(())
    }

    fn step(&mut self) -> Result<Step<'_>, Failure> {
        let (read, now) = (self.read(), self.now);
        if self.running.is_some() && !self.pace.fits(now) {
            self.running = None;
            return Err(Failure::new(Code::Memory, "there is not as much memory as when the model was loaded"));
        }
        let Some(running) = &mut self.running else {
            return Err(Failure::new(Code::Engine, "there is nothing to go on with"));
        };
        if running.cancelled || running.done == running.most {
            let end = if running.done == running.most { End::MaxTokens } else { End::Cancelled };
            let ending = Ending {
                end,
                prompt_tokens: read as u32,
                new_tokens: running.done as u32,
                prefill_us: running.first.saturating_sub(running.began) * 1000,
                decode_us: now.saturating_sub(running.first) * 1000,
            };
            self.running = None;
            return Ok(Step::Ended(ending));
        }
        if now < running.due {
            return Ok(Step::Pending);
        }
        if running.done == 0 {
            running.first = now;
        }
        let token = token(&self.prompt, running.done);
        running.done += 1;
        running.due = now + self.pace.step(read + running.done);
        // Six hexadecimal digits and spaces around: a token has 24 bits.
        self.text = *b" 000000 ";
        for (digit, to) in self.text[1..7].iter_mut().enumerate() {
            *to = b"0123456789abcdef"[(token >> (20 - 4 * digit) & 15) as usize];
        }
        Ok(Step::Token { token, text: &self.text })
    }

    fn cancel(&mut self) {
        match &mut self.running {
            Some(running) if running.due < u64::MAX => running.cancelled = true,
            running => *running = None,
        }
    }

    fn stats(&self) -> Stats {
        let held = self.running.map_or(0, |running| self.read() + running.done);
        Stats { tokens: held as u32, context: self.context, ..Stats::default() }
    }

    fn save(&mut self) -> Result<(), Failure> {
        Err(unsupported())
    }

    fn saved(&mut self) -> Result<Option<Snapshot>, Failure> {
        Err(unsupported())
    }

    fn read_snapshot(&mut self, _: u32, _: &mut [u8]) -> usize {
        0
    }

    fn restore(&mut self, _: Snapshot) -> Result<(), Failure> {
        Err(unsupported())
    }

    fn write_snapshot(&mut self, _: &[u8]) -> Result<(), Failure> {
        Err(unsupported())
    }

    fn restored(&mut self) -> Result<Option<u32>, Failure> {
        Err(unsupported())
    }
}

fn unsupported() -> Failure {
    Failure::new(Code::Unsupported, "an engine without weights has no cache to save")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Steady;

    impl Pace for Steady {
        fn prompt(&self, tokens: usize) -> u64 {
            10 + tokens as u64 / 8
        }
        fn step(&self, _: usize) -> u64 {
            4
        }
    }

    const CONTEXT: u32 = 4096;

    fn asks(random: &mut Rng) -> Vec<Ask> {
        (0..random.usize(1..=5))
            .map(|_| Ask {
                at: random.u64(0..3000),
                prompt: (0..random.usize(1..700)).map(|_| random.u8(..)).collect(),
                tokens: random.u32(1..60),
                cancel: random.bool().then(|| random.u32(0..50)),
            })
            .collect()
    }

    fn weather(random: &mut Rng) -> Weather {
        // From a clean line to one on which hardly a frame is whole.
        let mut share = || if random.bool() { 0.0 } else { 10f64.powf(-1.5 - 3.0 * random.f64()) };
        let mut faults =
            || Faults { lost: share(), flipped: share(), duplicated: share(), delayed: share(), ..Faults::default() };
        let (mut to_device, mut to_host) = (faults(), faults());
        for faults in [&mut to_device, &mut to_host] {
            faults.delay = random.u64(1..400);
            faults.rate = if random.u8(..4) == 0 { random.u64(1..12) } else { 0 };
            faults.cuts = (0..random.usize(0..4)).map(|_| random.u64(1..9000)).collect();
            faults.down = random.u64(0..3000);
        }
        Weather {
            to_device,
            to_host,
            power: (0..random.usize(0..4)).map(|_| random.u64(0..12_000)).collect(),
            off: random.u64(0..2000),
            balks: if random.bool() { 0.0 } else { random.f64() * 0.6 },
            until: random.u64(5000..15_000),
        }
    }

    /// Everything asked is answered in the end, and rightly, to the last token.
    fn check(asks: &[Ask], told: &Conversation, seed: u64) {
        assert!(told.over.is_some(), "seed {seed}: not over: {told:?}");
        for (ask, heard) in asks.iter().zip(&told.heard) {
            let expected: Vec<u32> = (0..ask.tokens as usize).map(|index| token(&ask.prompt, index)).collect();
            assert_eq!(heard.failed, None, "seed {seed}");
            assert_eq!(heard.tokens, expected[..heard.tokens.len()], "seed {seed}: a wrong token");
            if heard.cancelled {
                let cancel = ask.cancel.expect("nobody cancelled it") as usize;
                assert!(heard.tokens.len() >= cancel, "seed {seed}: it ended before it was enough");
            } else {
                assert_eq!(heard.tokens.len(), expected.len(), "seed {seed}: tokens are missing");
            }
            let text: String = heard.tokens.iter().map(|token| format!(" {token:06x} ")).collect();
            assert_eq!(heard.text, text.as_bytes(), "seed {seed}");
        }
    }

    #[test]
    fn a_thousand_schedules_of_faults() {
        let (mut restarts, mut damaged, mut resent, mut again) = (0, 0, 0, 0);
        for seed in 0..1000 {
            let mut random = Rng::with_seed(seed);
            let (asks, weather) = (asks(&mut random), weather(&mut random));
            // A minute of a line that works is enough for anything.
            let limit = weather.until + 60_000;
            let told = converse(&asks, &mut || Scripted::new("scripted", CONTEXT, None, Steady), &weather, seed, limit);
            check(&asks, &told, seed);
            restarts += told.restarts;
            damaged += told.damaged;
            resent += told.resent;
            again += told.heard.iter().filter(|heard| heard.asked > 1).count();
        }
        // They were no fair weather.
        assert!(
            restarts > 100 && damaged > 1000 && resent > 1000 && again > 100,
            "{restarts} {damaged} {resent} {again}"
        );
    }

    /// One fault, at each place where there can be one.
    #[test]
    fn a_line_may_be_cut_at_any_byte_and_power_at_any_step() {
        let ask = [Ask { at: 0, prompt: b"What is that noise?".to_vec(), tokens: 12, cancel: None }];
        let run = |weather: Weather| {
            // Nothing heals before it is over.
            let weather = Weather { until: 60_000, ..weather };
            let told = converse(&ask, &mut || Scripted::new("scripted", CONTEXT, None, Steady), &weather, 3, 60_000);
            check(&ask, &told, 3);
            told
        };
        let calm = run(Weather::default());
        assert_eq!((calm.restarts, calm.resent), (0, 0));
        let cut = |byte| Faults { cuts: vec![byte], down: 50, ..Faults::default() };
        let mut resent = [0, 0];
        for byte in 1..=500 {
            resent[0] += run(Weather { to_device: cut(byte), ..Weather::default() }).resent;
            resent[1] += run(Weather { to_host: cut(byte), ..Weather::default() }).resent;
        }
        assert!(resent[0] > 50 && resent[1] > 200, "{resent:?}");
        let steps = (2..calm.over.unwrap()).step_by(TICK as usize);
        let restarts = steps.clone().filter(|&at| {
            let told = run(Weather { power: vec![at], off: 50, ..Weather::default() });
            told.heard[0].asked == 2
        });
        assert!(restarts.count() + 5 > steps.count(), "but for those before it was asked and after all was said");
    }

    #[test]
    fn the_same_seed_goes_the_same_way() {
        let run = || {
            let mut random = Rng::with_seed(5);
            let (asks, weather) = (asks(&mut random), weather(&mut random));
            converse(&asks, &mut || Scripted::new("scripted", CONTEXT, None, Steady), &weather, 5, 100_000)
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn a_cancelled_request_ends_within_a_token() {
        let ask = Ask { at: 0, prompt: b"go on".to_vec(), tokens: 1000, cancel: Some(10) };
        let engine = &mut || Scripted::new("scripted", CONTEXT, None, Steady);
        let told = converse(&[ask], engine, &Weather::default(), 1, 60_000);
        assert!(told.heard[0].cancelled);
        // What was under way when it was said, and one.
        assert!((10..=13).contains(&told.heard[0].tokens.len()), "{:?}", told.heard[0].tokens.len());
    }

    #[test]
    fn what_cannot_be_is_told() {
        let ask = Ask { at: 0, prompt: vec![1; 4000], tokens: 1000, cancel: None };
        let engine = &mut || Scripted::new("scripted", CONTEXT, None, Steady);
        let told = converse(&[ask], engine, &Weather::default(), 1, 60_000);
        assert_eq!(told.heard[0].failed, Some(Code::Context as u8));
    }
}
