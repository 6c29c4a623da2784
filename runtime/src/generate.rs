//! A reply: the prompt is read, then token follows token until something ends it.
//!
//! # Example
//!
//! ```no_run
//! use std::{ops::ControlFlow, path::Path};
//! use thinkey::{
//!     engine::{Engine, EngineOptions, SessionOptions},
//!     generate::{Event, Request, generate},
//!     model::transformer::WINDOW,
//!     sample::{Sampler, Sampling},
//!     text::Tokenizer,
//!     weights::Checkpoint,
//! };
//! use thinkey_core::{Lambda, StorageKind};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open(Path::new("model.gguf"))?;
//! let tokenizer = Tokenizer::new(checkpoint.tokenizer()?)?;
//! let mut engine = Engine::load(&checkpoint, EngineOptions::default(), &mut |_, _| {})?;
//! let mut tokens = tokenizer.encode_plain("Once upon a time", true)?;
//! let plan = engine.config().cache_plan(1, tokens.len() + 100, 32, StorageKind::F16);
//! let kept = Lambda::from_per_mille(500)?.kept(engine.config().head_dim);
//! let mut session = engine.session(SessionOptions::new(plan, WINDOW), |_, _| kept)?;
//! let mut sampler = Sampler::new(Sampling::default())?;
//! let request = Request {
//!     slot: 0,
//!     tokens: &mut tokens,
//!     sampler: &mut sampler,
//!     tokenizer: &tokenizer,
//!     max_tokens: 100,
//!     continues: true,
//! };
//! let reply = generate(&mut engine, &mut session, request, &mut |event| {
//!     if let Event::Token { text, .. } | Event::Rest(text) = event {
//!         print!("{text}");
//!     }
//!     ControlFlow::Continue(())
//! })?;
//! println!("\n{} tokens, {:.0} a second", reply.new_tokens, reply.decode_rate());
//! # Ok(())
//! # }
//! ```

use crate::{
    engine::{Engine, Session},
    model::ModelError,
    sample::Sampler,
    text::Tokenizer,
};
use serde::Serialize;
use std::{
    fmt,
    ops::ControlFlow,
    time::{Duration, Instant},
};

/// What a reply is made of.
pub struct Request<'a> {
    /// The sequence that goes on.
    pub slot: usize,
    /// The tokens of the sequence: those that it [holds](Session::position), then the prompt. The tokens of the reply are
    /// added, the stop token is not. The last of them may not be in the cache yet, since nothing was computed after it;
    /// it is fed with the next prompt. So `tokens[..session.position(slot)]` is always what the cache holds.
    pub tokens: &'a mut Vec<u32>,
    /// Chooses the tokens; a repetition penalty applies to all of `tokens`.
    pub sampler: &'a mut Sampler,
    /// Knows the stop tokens and the text of the others.
    pub tokenizer: &'a Tokenizer,
    /// Most tokens of the reply.
    pub max_tokens: usize,
    /// Whether the reply goes on in the middle of the prompt's text, so that a space at its start is text. The reply to a
    /// rendered template does not.
    pub continues: bool,
}

/// What happens during a reply.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// The prompt is through so many layers of so many.
    Read {
        /// Layers done.
        done: usize,
        /// Layers of the model.
        of: usize,
    },
    /// A token was chosen.
    Token {
        /// Its number.
        token: u32,
        /// The text that it completes; empty where a character is spread over several tokens.
        text: &'a str,
    },
    /// The reply is over, and this is what a character that was left incomplete comes to.
    Rest(&'a str),
}

/// Told what happens; to answer [`ControlFlow::Break`] is to interrupt.
pub type OnEvent<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'a;

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The model chose a stop token.
    Stop,
    /// It has as many tokens as were asked for.
    MaxTokens,
    /// The cache holds no more tokens.
    ContextFull,
    /// The caller interrupted it.
    Interrupted,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop token",
            Self::MaxTokens => "most tokens asked for",
            Self::ContextFull => "context full",
            Self::Interrupted => "interrupted",
        })
    }
}

/// A reply and what it took.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The text, without its stop token.
    pub text: String,
    /// Tokens that were read before the first of the reply.
    pub prompt_tokens: usize,
    /// Tokens of the reply, without the stop token.
    pub new_tokens: usize,
    /// Decode steps: tokens of the reply that were fed to find the next.
    pub steps: usize,
    /// Time to read the prompt.
    pub prefill: Duration,
    /// Time from there to the end.
    pub decode: Duration,
    /// Why it ended.
    pub end: End,
}

impl Reply {
    /// Prompt tokens read a second.
    #[must_use]
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Decode steps a second; 0 where there was none.
    #[must_use]
    pub fn decode_rate(&self) -> f64 {
        rate(self.steps, self.decode)
    }
}

fn rate(count: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { count as f64 / time.as_secs_f64() }
}

/// Reads the prompt and writes a reply to it. An interruption after the prompt ends the reply, with what there is of it.
///
/// # Errors
/// [`ModelError::Interrupted`] where `on_event` breaks while the prompt is read: the sequence is forgotten. Others as
/// [`Engine::prefill`] and [`Engine::decode`]; `tokens` is as given where the prompt is refused.
///
/// # Panics
/// Where the sequence holds more tokens than `request.tokens` has.
pub fn generate(
    engine: &mut Engine,
    session: &mut Session,
    request: Request<'_>,
    on_event: &mut OnEvent<'_>,
) -> Result<Reply, ModelError> {
    let Request { slot, tokens, sampler, tokenizer, max_tokens, continues } = request;
    let prompt = &tokens[session.position(slot)..];
    let prompt_tokens = prompt.len();
    let start = Instant::now();
    let mut interrupted = false;
    let logits = engine.prefill(session, slot, prompt, &mut |done, of| {
        let flow = on_event(Event::Read { done, of });
        interrupted |= flow.is_break();
        flow
    })?;
    if interrupted {
        // The last layer was under way; to the caller it is as in the layers before.
        session.clear(slot);
        return Err(ModelError::Interrupted);
    }
    let prefill = start.elapsed();

    let start = Instant::now();
    let words = tokenizer.detokeniser();
    let mut words = if continues { words.continuing() } else { words };
    let mut text = String::new();
    let (mut new_tokens, mut steps) = (0, 0);
    let mut next = (max_tokens > 0).then(|| sampler.sample(logits, tokens));
    let end = loop {
        let Some(token) = next else {
            break End::MaxTokens;
        };
        if tokenizer.is_stop(token) {
            break End::Stop;
        }
        tokens.push(token);
        new_tokens += 1;
        let completed = words.push(token);
        text.push_str(completed);
        if on_event(Event::Token { token, text: completed }).is_break() {
            break End::Interrupted;
        }
        if new_tokens == max_tokens {
            break End::MaxTokens;
        }
        if session.position(slot) >= session.plan().tokens {
            break End::ContextFull;
        }
        // A device brings no more to the host than the choice takes.
        next = Some(match sampler.wants() {
            Some(count) => sampler.sample_best(engine.decode_best(session, &[slot], &[token], count)?),
            None => sampler.sample(engine.decode(session, &[slot], &[token])?, tokens),
        });
        steps += 1;
    };
    let rest = words.finish();
    if !rest.is_empty() {
        text.push_str(rest);
        // The reply is over, whatever the answer.
        let _ = on_event(Event::Rest(rest));
    }
    Ok(Reply { text, prompt_tokens, new_tokens, steps, prefill, decode: start.elapsed(), end })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::{EngineOptions, SessionOptions},
        model::Architecture,
        sample::Sampling,
        text,
        weights::{self, Checkpoint, TokenizerSource},
    };
    use std::path::Path;
    use thinkey_core::StorageKind;

    /// A tiny model with random weights, and a tokenizer for it. A mute one finds every token equally likely, so it
    /// chooses the first, which ends a text.
    fn model(mute: bool) -> (Engine, Tokenizer) {
        let source = text::fixture::byte_level();
        let mut config = weights::fixture::config(Architecture::Llama);
        config.vocab = source.tokens.len();
        let mut file = weights::fixture::gguf(&config);
        if mute {
            file.vector("output_norm.weight", &vec![0.0; config.width]);
        }
        let checkpoint = Checkpoint::from_gguf(Path::new("m.gguf"), file.to_bytes().into()).unwrap();
        let options = EngineOptions { threads: 1, ..EngineOptions::default() };
        let engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
        (engine, Tokenizer::new(TokenizerSource::Gguf(source)).unwrap())
    }

    /// A session that prunes nothing.
    fn session(engine: &Engine, tokens: usize) -> Session {
        let config = engine.config();
        let plan = config.cache_plan(1, tokens, 32, StorageKind::F32);
        engine.session(SessionOptions::new(plan, 32), |_, _| config.head_dim).unwrap()
    }

    fn proceed(_: Event<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// A greedy reply to `tokens`.
    fn reply(
        model: &mut (Engine, Tokenizer),
        session: &mut Session,
        tokens: &mut Vec<u32>,
        max_tokens: usize,
        on_event: &mut OnEvent<'_>,
    ) -> Result<Reply, ModelError> {
        let mut sampler = Sampler::new(Sampling::default()).unwrap();
        let (engine, tokenizer) = model;
        let request = Request { slot: 0, tokens, sampler: &mut sampler, tokenizer, max_tokens, continues: true };
        generate(engine, session, request, on_event)
    }

    /// The likeliest next token, computed from nothing.
    fn next(engine: &mut Engine, tokens: &[u32]) -> u32 {
        let mut session = session(engine, tokens.len());
        let logits = engine.prefill(&mut session, 0, tokens, &mut |_, _| ControlFlow::Continue(())).unwrap();
        (0..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0
    }

    #[test]
    fn two_turns_choose_the_likeliest_tokens() {
        let mut model = model(false);
        let mut session = session(&model.0, 100);
        let prompt = model.1.encode_plain("hello to the dog", false).unwrap();
        let mut tokens = prompt.clone();
        let mut streamed = String::new();
        let first = reply(&mut model, &mut session, &mut tokens, 5, &mut |event| {
            if let Event::Token { text, .. } | Event::Rest(text) = event {
                streamed.push_str(text);
            }
            ControlFlow::Continue(())
        });
        let first = first.unwrap();
        assert_eq!(
            (first.prompt_tokens, first.new_tokens, first.steps, first.end),
            (prompt.len(), 5, 4, End::MaxTokens)
        );
        assert_eq!(first.text, streamed);
        assert_eq!(first.text, model.1.decode(&tokens[prompt.len()..]));
        assert_eq!(session.position(0), tokens.len() - 1, "the last token waits for what comes after it");

        let question = tokens.len() - 1;
        tokens.extend(model.1.encode_plain(" and then?", false).unwrap());
        let asked = tokens.len();
        let second = reply(&mut model, &mut session, &mut tokens, 4, &mut proceed).unwrap();
        assert_eq!((second.prompt_tokens, second.new_tokens), (asked - question, 4));
        for at in (prompt.len()..question + 1).chain(asked..asked + 4) {
            assert_eq!(tokens[at], next(&mut model.0, &tokens[..at]), "token {at}");
        }
    }

    #[test]
    fn a_stop_token_ends_the_reply_and_is_no_part_of_it() {
        let mut model = model(true);
        let mut session = session(&model.0, 100);
        let mut tokens = vec![10, 11];
        let reply = reply(&mut model, &mut session, &mut tokens, 5, &mut proceed).unwrap();
        assert_eq!((reply.end, reply.new_tokens, reply.text.as_str()), (End::Stop, 0, ""));
        assert_eq!((tokens.len(), session.position(0)), (2, 2));
    }

    #[test]
    fn a_full_context_ends_the_reply() {
        let mut model = model(false);
        let mut session = session(&model.0, 10);
        let mut tokens = vec![10, 11, 12];
        let end = reply(&mut model, &mut session, &mut tokens, 50, &mut proceed).unwrap();
        // Ten are held, and the token after the tenth is known.
        assert_eq!((end.end, end.new_tokens, session.position(0)), (End::ContextFull, 8, 10));
        let before = tokens.clone();
        let error = reply(&mut model, &mut session, &mut tokens, 50, &mut proceed).unwrap_err();
        assert!(matches!(error, ModelError::Core(_)), "{error}");
        assert_eq!(tokens, before);
    }

    #[test]
    fn an_interrupted_reply_can_be_gone_on_with() {
        let mut model = model(false);
        let mut whole = vec![10, 11, 12];
        let mut whole_session = session(&model.0, 50);
        reply(&mut model, &mut whole_session, &mut whole, 9, &mut proceed).unwrap();

        let mut session = session(&model.0, 50);
        let mut tokens = vec![10, 11, 12];
        let mut seen = 0;
        let cut = reply(&mut model, &mut session, &mut tokens, 9, &mut |event| {
            seen += usize::from(matches!(event, Event::Token { .. }));
            if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let cut = cut.unwrap();
        assert_eq!((cut.end, cut.new_tokens), (End::Interrupted, 3));
        reply(&mut model, &mut session, &mut tokens, 6, &mut proceed).unwrap();
        assert_eq!(tokens, whole);
    }

    #[test]
    fn an_interrupted_prompt_is_forgotten() {
        let mut model = model(false);
        let mut session = session(&model.0, 50);
        let mut tokens = vec![10, 11, 12];
        for layer in [1, 2] {
            let stop = |event: Event<'_>| match event {
                Event::Read { done, of } if done == layer => {
                    assert_eq!(of, 2);
                    ControlFlow::Break(())
                }
                Event::Read { .. } => ControlFlow::Continue(()),
                Event::Token { text, .. } | Event::Rest(text) => panic!("{text:?} after an interruption"),
            };
            let error = reply(&mut model, &mut session, &mut tokens, 9, &mut { stop }).unwrap_err();
            assert!(matches!(error, ModelError::Interrupted), "{error}");
            assert_eq!((session.position(0), tokens.len()), (0, 3));
        }
        reply(&mut model, &mut session, &mut tokens, 1, &mut proceed).unwrap();
        assert_eq!(tokens[3], next(&mut model.0, &tokens[..3]));
    }
}
