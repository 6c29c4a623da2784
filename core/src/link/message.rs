//! What host and device say to each other. The order of variants and fields is the format: new ones go to the end.

use super::{MAX_BODY, frame::Body};
use crate::{CacheBytes, Error};
use heapless::String;
use serde::{Deserialize, Serialize};

/// Most bytes of text that a token event carries; longer ones are followed by [`ToHost::Text`].
pub const MAX_TEXT: usize = 192;

/// Most bytes of a chunk of a prompt, a snapshot or a log.
pub const MAX_CHUNK: usize = 224;

/// Most bytes of the names and lines of a [`Welcome`], a [`Start`] or a failure.
pub const MAX_LINE: usize = 96;

const _: () = assert!(MAX_CHUNK + 16 <= MAX_BODY && MAX_TEXT + 16 <= MAX_BODY);

/// What is said in session 0.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Greeting<'a> {
    /// By the host.
    Hello(Hello),
    /// By the device.
    #[serde(borrow)]
    Welcome(Welcome<'a>),
    /// By the device: it speaks this version, and not the host's.
    Rejected {
        /// The device's version.
        version: u16,
        /// As the host said.
        client: u32,
    },
}

/// The host is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Hello {
    /// [`VERSION`](super::VERSION). Stays the first field.
    pub version: u16,
    /// A number that the host drew, so that another is another's.
    pub client: u32,
    /// How often it began anew.
    pub attempt: u16,
}

/// The device is there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Welcome<'a> {
    /// As the host said.
    pub client: u32,
    /// As the host said.
    pub attempt: u16,
    /// The session, never 0.
    pub session: u32,
    /// What the device can do.
    #[serde(borrow)]
    pub capabilities: Capabilities<'a>,
}

/// What a device can do. Texts are at most [`MAX_LINE`] bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Capabilities<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Tokens of a sequence, prompt and answer.
    pub context: u32,
    /// Bytes of memory that may be taken, weights included; 0 where nobody set a limit.
    pub budget: u64,
    /// The policy of a [`Start`] that names none, in [one line](crate::policy).
    pub policy: &'a str,
    /// Whether a start may name another.
    pub policies: bool,
    /// Whether snapshots can be had.
    pub snapshots: bool,
}

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Sampling {
    /// 0 takes the likeliest.
    pub temperature: f32,
    /// Most tokens to choose from; 0 is off.
    pub top_k: u32,
    /// Likeliest tokens that hold this probability; 1 is off.
    pub top_p: f32,
    /// Least share of the likeliest one's probability; 0 is off.
    pub min_p: f32,
    /// Penalty of tokens that were seen; 1 is off.
    pub repetition_penalty: f32,
    /// Same seed, same answer.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// How the bytes of a prompt are meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Form {
    /// A message of a user: the model's chat template is put around it.
    #[default]
    Message,
    /// Text to go on with, as it is.
    Raw,
}

/// What a completion is made of; its prompt follows. By default an empty one, no token, and the device's own policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Start<'a> {
    /// Bytes of the prompt.
    pub prompt_bytes: u32,
    /// How they are meant.
    pub form: Form,
    /// Whether it goes on with what the cache holds, or begins anew. With an empty prompt, the text just goes on.
    pub append: bool,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// How they are chosen.
    pub sampling: Sampling,
    /// What the cache does, in [one line](crate::policy) of at most [`MAX_LINE`] bytes; empty for the device's own.
    pub policy: &'a str,
}

/// From the host.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum ToDevice<'a> {
    /// A completion is asked for.
    Start {
        /// The host's number for it, which no other that is under way has.
        request: u16,
        /// All but the prompt.
        #[serde(borrow)]
        start: Start<'a>,
    },
    /// The next bytes of an accepted request's prompt.
    Prompt {
        /// Which request.
        request: u16,
        /// At most [`MAX_CHUNK`].
        bytes: &'a [u8],
    },
    /// A request is to end now. Where it has ended, nothing happens.
    Cancel {
        /// Which request.
        request: u16,
    },
    /// [`ToHost::Stats`] is asked for.
    Stats,
    /// [`ToHost::Health`] is asked for.
    Health,
    /// A snapshot of the cache is asked for.
    Save,
    /// A snapshot is to be restored; its chunks follow.
    Restore(Snapshot),
    /// The next bytes of it.
    Chunk {
        /// At most [`MAX_CHUNK`].
        bytes: &'a [u8],
    },
}

/// From the device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum ToHost<'a> {
    /// A request's turn has come: its prompt may follow.
    Accepted {
        /// Which request.
        request: u16,
    },
    /// A request, or what was asked without one, has failed.
    Failed {
        /// Which request, if it was one.
        request: Option<u16>,
        /// Why.
        code: Code,
        /// The same for people.
        detail: &'a str,
    },
    /// The prompt is through so many parts of so many.
    Read {
        /// Which request.
        request: u16,
        /// Parts done.
        done: u16,
        /// Parts there are.
        of: u16,
    },
    /// The next token.
    Token {
        /// Which request.
        request: u16,
        /// Its number in the vocabulary.
        token: u32,
        /// The characters that it completes, in UTF-8, perhaps none; at most [`MAX_TEXT`] bytes.
        text: &'a [u8],
    },
    /// More of the last token's text, or what an incomplete character at the end comes to.
    Text {
        /// Which request.
        request: u16,
        /// At most [`MAX_TEXT`] bytes.
        text: &'a [u8],
    },
    /// A request is through.
    Ended {
        /// Which request.
        request: u16,
        /// How, and what it took.
        ending: Ending,
    },
    /// What the cache takes and does.
    Stats(Stats),
    /// How the device is.
    Health(Health),
    /// A snapshot follows in chunks.
    Snapshot(Snapshot),
    /// The next bytes of it.
    Chunk {
        /// At most [`MAX_CHUNK`].
        bytes: &'a [u8],
    },
    /// A snapshot is in the cache.
    Restored {
        /// Tokens that it holds.
        tokens: u32,
    },
    /// Bytes of the device's log: defmt frames, cut anywhere.
    Log {
        /// At most [`MAX_CHUNK`].
        bytes: &'a [u8],
    },
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum End {
    /// The model chose a stop token.
    Stop,
    /// It has as many tokens as were asked for.
    MaxTokens,
    /// The cache holds no more tokens.
    ContextFull,
    /// The host cancelled it.
    Cancelled,
}

/// How a completion ended, and what it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Ending {
    /// Why.
    pub end: End,
    /// Tokens read.
    pub prompt_tokens: u32,
    /// Tokens written.
    pub new_tokens: u32,
    /// Microseconds to read the prompt.
    pub prefill_us: u64,
    /// Microseconds from there to the end.
    pub decode_us: u64,
}

/// What the cache takes and does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Stats {
    /// Bytes by part.
    pub bytes: CacheBytes,
    /// Bytes that a whole cache in f16 would take.
    pub whole_bytes: u64,
    /// λ in force, in per mille, where the policy has one.
    pub lambda: Option<u16>,
    /// Tokens that the cache holds.
    pub tokens: u32,
    /// Tokens that there is room for.
    pub context: u32,
    /// Blocks of 32 tokens that were thinned since the sequence began.
    pub flushes: u32,
}

/// How the device is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Health {
    /// Milliseconds since the device's loop began.
    pub uptime_ms: u64,
    /// Bytes of memory that are free, where the device knows.
    pub free_bytes: Option<u64>,
    /// Requests ended since then, failed ones included.
    pub requests: u32,
    /// Requests that wait for their turn.
    pub waiting: u16,
    /// Whether one is under way.
    pub busy: bool,
    /// Frames that came damaged.
    pub damaged: u32,
    /// Frames sent again.
    pub resent: u32,
    /// Bytes of log that were dropped because there was no room.
    pub lost_log: u32,
}

/// A snapshot, before its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Snapshot {
    /// Bytes.
    pub bytes: u32,
    /// CRC-32 (ISO-HDLC) of them.
    pub checksum: u32,
}

/// Why something failed. The numbers are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[repr(u8)]
pub enum Code {
    /// The message cannot be read, or does not belong where it came.
    Protocol = 0,
    /// As many requests wait as can; or one is under way, beside which this cannot be.
    Busy = 1,
    /// The policy cannot be.
    Policy = 2,
    /// A sampling option is outside its range.
    Sampling = 3,
    /// The prompt cannot be read, or is empty.
    Prompt = 4,
    /// Prompt and answer are longer than the context.
    Context = 5,
    /// There is not as much memory.
    Memory = 6,
    /// The snapshot is of another model, policy or version.
    Foreign = 7,
    /// The snapshot is damaged.
    Damaged = 8,
    /// The device cannot do this at all.
    Unsupported = 9,
    /// The model or the device it is computed on failed.
    Engine = 10,
}

/// Why something failed, with a line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Failure {
    /// The code.
    pub code: Code,
    /// The line; its end is cut off where it is too long.
    pub detail: String<MAX_LINE>,
}

impl Failure {
    /// A failure that `detail` describes.
    #[must_use]
    pub fn new(code: Code, detail: &str) -> Self {
        // A cut text is shorter than the capacity.
        Self { code, detail: String::try_from(cut(detail)).unwrap_or_default() }
    }
}

/// The longest start of `text` that is a line of at most [`MAX_LINE`] bytes.
#[must_use]
pub fn cut(text: &str) -> &str {
    let mut len = text.len().min(MAX_LINE);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    &text[..len]
}

/// Writes a message to the front of `memory`; returns it.
///
/// # Errors
/// [`Error::Capacity`] where it does not fit.
pub fn encode<'a, T: Serialize>(message: &T, memory: &'a mut [u8]) -> Result<&'a mut [u8], Error> {
    let capacity = memory.len();
    postcard::to_slice(message, memory).map_err(|_| Error::Capacity {
        what: "message bytes",
        needed: MAX_BODY,
        capacity,
    })
}

/// A message as the body of a frame.
///
/// # Errors
/// As [`encode`].
pub fn body<T: Serialize>(message: &T) -> Result<Body, Error> {
    let mut memory = [0; MAX_BODY];
    let bytes = encode(message, &mut memory)?;
    Ok(Body::from_slice(bytes).unwrap_or_default())
}

/// Reads the message that `body` is, and nothing else.
///
/// # Errors
/// [`Error::Frame`] where it is none.
pub fn decode<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Error> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(Error::Frame),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::frame::{self, Header, MAX_FRAME};
    use proptest::prelude::*;

    #[test]
    fn numbers_are_stable() {
        let first = |message: &ToHost<'_>| body(message).unwrap()[0];
        assert_eq!(first(&ToHost::Accepted { request: 0 }), 0);
        assert_eq!(first(&ToHost::Token { request: 0, token: 0, text: b"" }), 3);
        assert_eq!(first(&ToHost::Stats(Stats::default())), 6);
        assert_eq!(first(&ToHost::Log { bytes: b"" }), 11);
        let first = |message: &ToDevice<'_>| body(message).unwrap()[0];
        assert_eq!(first(&ToDevice::Cancel { request: 0 }), 2);
        assert_eq!(first(&ToDevice::Chunk { bytes: b"" }), 7);
        let failed = ToHost::Failed { request: Some(300), code: Code::Engine, detail: "no" };
        assert_eq!(body(&failed).unwrap(), [1, 1, 0xac, 2, 10, 2, b'n', b'o']);
    }

    /// A token event costs at most 16 bytes beside its token and text: the worst request number and text length.
    #[test]
    fn a_token_event_costs_at_most_16_bytes() {
        for (text, token, numbers) in
            [(&b"t"[..], 0, 1), (b" internationalisation", 49_151, 3), (&[b'x'; 127], u32::MAX, 5)]
        {
            for request in [0, 127, 128, u16::MAX] {
                let body = body(&ToHost::Token { request, token, text }).unwrap();
                let header = Header { sequence: u16::MAX, acknowledged: u16::MAX };
                let mut line = [0; MAX_FRAME];
                let frame = frame::encode(u32::MAX, header, &body, &mut line).unwrap();
                let overhead = frame.len() - text.len() - numbers;
                assert!(overhead <= 16, "{overhead} bytes for request {request}, token {token}");
            }
        }
    }

    /// The longest messages fit a frame.
    #[test]
    fn every_message_fits() {
        let line = core::str::from_utf8(&[b'x'; MAX_LINE]).unwrap();
        let start = Start {
            prompt_bytes: u32::MAX,
            form: Form::Raw,
            append: true,
            max_tokens: u32::MAX,
            sampling: Sampling { top_k: u32::MAX, seed: u64::MAX, ..Sampling::default() },
            policy: line,
        };
        body(&ToDevice::Start { request: u16::MAX, start }).unwrap();
        body(&ToDevice::Prompt { request: u16::MAX, bytes: &[0; MAX_CHUNK] }).unwrap();
        body(&ToHost::Token { request: u16::MAX, token: u32::MAX, text: &[0; MAX_TEXT] }).unwrap();
        body(&ToHost::Failed { request: Some(u16::MAX), code: Code::Engine, detail: line }).unwrap();
        let most = usize::MAX;
        let bytes = CacheBytes {
            prefix_keys: most,
            prefix_values: most,
            recent: most,
            sinks: most,
            corrections: most,
            energies: most,
            masks: most,
            tables: most,
            ranks: most,
        };
        let (whole_bytes, lambda) = (u64::MAX, Some(999));
        let stats = Stats { bytes, whole_bytes, lambda, tokens: u32::MAX, context: u32::MAX, flushes: u32::MAX };
        body(&ToHost::Stats(stats)).unwrap();
        let capabilities = Capabilities {
            model: line,
            context: u32::MAX,
            budget: u64::MAX,
            policy: line,
            policies: true,
            snapshots: true,
        };
        let welcome = Welcome { client: u32::MAX, attempt: u16::MAX, session: u32::MAX, capabilities };
        body(&Greeting::Welcome(welcome)).unwrap();
    }

    #[test]
    fn lines_are_cut_between_characters() {
        let long = "é".repeat(60) + "x";
        assert_eq!(Failure::new(Code::Policy, &long).detail.as_str(), "é".repeat(48));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..=MAX_BODY)) {
            if let Ok(message) = decode::<ToDevice<'_>>(&bytes) {
                let again = body(&message).unwrap();
                let _ = decode::<ToDevice<'_>>(&again).unwrap();
            }
            if let Ok(message) = decode::<ToHost<'_>>(&bytes) {
                let again = body(&message).unwrap();
                let _ = decode::<ToHost<'_>>(&again).unwrap();
            }
            let _ = decode::<Greeting<'_>>(&bytes);
        }
    }
}
