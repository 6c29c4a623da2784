//! The default model behind a device's loop, in one process.
#![allow(missing_docs, reason = "tests")]

use std::{
    ops::ControlFlow,
    thread,
    time::{Duration, Instant},
};
use thinkey::{
    store::{DEFAULT, Store},
    weights::Checkpoint,
};
use thinkey_core::link::{
    Client, Device,
    client::Event,
    message::{End, Ending, Form, Sampling, Start, ToHost},
    reliable::Timing,
};
use thinkey_firmware_host::engine::{ModelEngine, Options};

struct World {
    device: Device<ModelEngine>,
    client: Client,
    begun: Instant,
}

impl World {
    fn new() -> Self {
        let path = Store::open().unwrap().pull(DEFAULT.id, &mut |_| ControlFlow::Continue(())).unwrap();
        let options = Options { context: Some(700), ..Options::default() };
        let engine = ModelEngine::load(Checkpoint::open(&path).unwrap(), options, || {}).unwrap();
        let mut world = Self {
            device: Device::new(engine, 1, Timing::default(), 0),
            client: Client::new(2, Timing::default()),
            begun: Instant::now(),
        };
        while !world.client.is_connected() {
            world.round(&mut |_| {});
        }
        world
    }

    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64
    }

    /// The host says something, the device hears it, works until there is nothing to do, and is heard.
    fn round(&mut self, hear: &mut dyn FnMut(ToHost<'_>)) {
        let (now, mut memory) = (self.now(), [0; 4096]);
        let len = self.client.transmit(now, &mut memory);
        self.device.receive(now, &memory[..len]);
        while self.device.poll(now) {}
        let len = self.device.transmit(now, &mut memory);
        self.client.receive(now, &memory[..len], &mut |event| {
            if let Event::Message(message) = event {
                hear(message);
            }
            true
        });
    }

    /// Asks, cancels after so many tokens, and waits for the end: the tokens that came after the device had read the
    /// cancellation, all tokens, and the end.
    fn cancelled_after(
        &mut self,
        prompt: &[u8],
        append: bool,
        after: usize,
        patience: Duration,
    ) -> (usize, usize, Ending) {
        let start = Start {
            prompt_bytes: prompt.len() as u32,
            form: Form::Raw,
            append,
            max_tokens: 400,
            sampling: Sampling::default(),
            policy: "",
        };
        let request = self.client.start(&start).unwrap();
        let (mut tokens, mut sent, mut ending, mut before) = (0, 0, None, None);
        while ending.is_none() {
            let mut accepted = false;
            self.round(&mut |message| match message {
                ToHost::Accepted { .. } => accepted = true,
                ToHost::Token { .. } => tokens += 1,
                ToHost::Ended { ending: end, .. } => ending = Some(end),
                ToHost::Failed { detail, .. } => panic!("{detail}"),
                _ => {}
            });
            if accepted {
                sent += self.client.prompt(request, &prompt[sent..]);
            }
            if tokens >= after && before.is_none() {
                // The model may work on as long as it likes before anybody looks.
                thread::sleep(patience);
                self.client.cancel(request).unwrap();
                // All that the device has said is heard: what comes now comes after it has read this.
                before = Some(tokens);
            }
        }
        (tokens - before.unwrap(), tokens, ending.unwrap())
    }
}

#[test]
fn at_most_one_token_follows_a_cancellation() {
    let mut world = World::new();
    for (after, patience) in [(1, 0), (3, 0), (5, 30), (8, 300), (4, 3)] {
        let prompt = b"Once upon a time there was a";
        let (late, tokens, ending) = world.cancelled_after(prompt, false, after, Duration::from_millis(patience));
        assert!(late <= 1, "{late} tokens after it");
        assert_eq!((ending.end, ending.new_tokens as usize), (End::Cancelled, tokens));
    }
}

/// What was not told is not in the sequence either: a completion that goes on says what would have come.
#[test]
fn a_cancelled_completion_goes_on_where_the_host_thinks_it_is() {
    let mut world = World::new();
    let answer = |world: &mut World, prompt: &[u8], append, most| {
        let start = Start {
            prompt_bytes: prompt.len() as u32,
            form: Form::Raw,
            append,
            max_tokens: most,
            sampling: Sampling::default(),
            policy: "",
        };
        let request = world.client.start(&start).unwrap();
        let (mut list, mut ended, mut sent) = (Vec::new(), false, 0);
        while !ended {
            let mut accepted = false;
            world.round(&mut |message| match message {
                ToHost::Accepted { .. } => accepted = true,
                ToHost::Token { token, .. } => list.push(token),
                ToHost::Ended { .. } => ended = true,
                ToHost::Failed { detail, .. } => panic!("{detail}"),
                _ => {}
            });
            if accepted {
                sent += world.client.prompt(request, &prompt[sent..]);
            }
        }
        list
    };
    let prompt = b"Once upon a time there was a";
    let whole = answer(&mut world, prompt, false, 40);
    for patience in [0, 50] {
        let (_, tokens, _) = world.cancelled_after(prompt, false, 6, Duration::from_millis(patience));
        let rest = answer(&mut world, b"", true, 40 - tokens as u32);
        assert_eq!(rest, whole[tokens..], "after {tokens}");
    }
}
