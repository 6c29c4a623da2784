//! The model's thread: its cache, and what is done with it.

use super::{
    LoadError, gone,
    mailbox::{Said, Side},
    refused,
};
use std::{
    ops::ControlFlow,
    sync::{Arc, Mutex, PoisonError},
};
use thinkey::{
    engine::{Engine as Runtime, EngineOptions, Origin, Session},
    generate::{self, Event, Reply, Request, generate},
    model::{
        ModelError,
        transformer::{RECENT, WINDOW},
    },
    plan::{Planner, Workload},
    policy::{CacheDesign, Calibration},
    sample::Sampler,
    text::{ChatTemplate, Message, Tokenizer},
    weights::Checkpoint,
};
use thinkey_core::{
    Error, Policy, Span,
    link::message::{Code, End, Ending, Failure, Form, Stats},
    snapshot::{Snapshot, SnapshotError},
};

/// What the model's thread is given.
pub enum Work {
    Answer(Box<Job>),
    /// A snapshot is to be made; the number goes with what comes of it.
    Save(u32),
    /// Or taken.
    Restore(u32, Vec<u8>),
}

/// A completion.
pub struct Job {
    pub prompt: Vec<u8>,
    pub form: Form,
    pub append: bool,
    pub max_tokens: usize,
    pub sampler: Sampler,
    /// The device's, where nobody said; or that of what is appended to.
    pub policy: Option<Policy>,
}

/// The cache that the thread has, for a policy.
pub struct Held {
    policy: Policy,
    pub session: Session,
    /// As [`Request::tokens`].
    tokens: Vec<u32>,
}

/// The model's thread.
pub struct Worker {
    pub checkpoint: Checkpoint,
    pub calibration: Option<Calibration>,
    pub runtime: Runtime,
    pub options: EngineOptions,
    pub tokenizer: Tokenizer,
    pub template: ChatTemplate,
    pub context: usize,
    pub budget: u64,
    /// Where a request does not say.
    pub policy: Policy,
    /// Its fingerprint.
    pub model: [u8; 16],
    pub cache: Option<Held>,
    pub say: Side,
    pub wake: Box<dyn Fn() + Send>,
    pub stats: Arc<Mutex<Stats>>,
}

impl Worker {
    /// The design of a policy, if there is memory for it.
    fn design(&self, policy: Policy) -> Result<CacheDesign, LoadError> {
        let planner = Planner::new(&self.checkpoint, self.calibration.as_ref()).on(self.options.device);
        let design = planner.design(policy)?;
        if self.budget == 0 {
            return Ok(design);
        }
        let (context, threads) = (self.context, self.options.threads);
        let workload = Workload { context, prompt: None, slots: 1, policy, recent: RECENT, window: WINDOW, threads };
        let (needed, allowed) = (planner.plan(&workload)?.total(), self.budget as usize);
        if needed > allowed {
            return Err(LoadError::Memory { context, policy: Box::new(policy), needed, allowed });
        }
        Ok(design)
    }

    /// Has a cache of `policy`.
    pub fn open(&mut self, policy: Policy) -> Result<(), LoadError> {
        if self.cache.as_ref().is_some_and(|held| held.policy == policy) {
            return Ok(());
        }
        let design = self.design(policy)?;
        // Memory for both is not planned.
        self.cache = None;
        let options = design.options(1, self.context, RECENT, WINDOW);
        let session = self.runtime.session(options, |layer, head| design.kept(layer, head))?;
        self.cache = Some(Held { policy, session, tokens: Vec::new() });
        self.count();
        Ok(())
    }

    /// Says what the cache holds now.
    fn count(&self) {
        let Some(Held { policy, session, .. }) = &self.cache else { return };
        let plan = session.plan();
        let tokens = session.position(0);
        // Flushes depend on numbers alone.
        let flushes = Span::default().admit(tokens, plan.retention(), true).after.blocks;
        let stats = Stats {
            bytes: session.planned(),
            whole_bytes: plan.whole_bytes() as u64,
            lambda: policy.lambda().map(|lambda| lambda.per_mille()),
            tokens: tokens as u32,
            context: plan.tokens as u32,
            flushes,
        };
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = stats;
    }

    /// Does it; breaks where nobody hears what comes of it.
    pub fn work(&mut self, work: Work) -> ControlFlow<()> {
        let said = match work {
            Work::Answer(job) => Said::Ended(self.answer(*job)),
            Work::Save(number) => Said::Saved(number, self.save()),
            Work::Restore(number, bytes) => Said::Restored(number, self.restore(&bytes)),
        };
        self.count();
        let heard = self.say.0.put(said);
        (self.wake)();
        if heard { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        let Some(Held { policy, session, tokens }) = &self.cache else { return Err(refused(&SnapshotError::Empty)) };
        let origin = Origin { model: self.model, policy: *policy };
        session.save(0, &origin, tokens).map_err(|error| refused(&error))
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<u32, Failure> {
        let snapshot = Snapshot::open(bytes).map_err(|error| refused(&error))?;
        let policy = snapshot.header().policy;
        // Before the cache goes that there is.
        if snapshot.header().model != self.model {
            return Err(refused(&SnapshotError::Model));
        }
        self.open(policy).map_err(|error| opening(&error))?;
        let Some(Held { session, tokens, .. }) = &mut self.cache else { return Err(gone()) };
        let restored = session.restore(0, &Origin { model: self.model, policy }, &snapshot);
        match restored {
            Ok(list) => *tokens = list,
            Err(error) => {
                // It may be forgotten now.
                tokens.truncate(session.position(0));
                return Err(refused(&error));
            }
        }
        Ok(session.position(0) as u32)
    }

    fn answer(&mut self, job: Job) -> Result<Ending, Failure> {
        let Job { prompt, form, append, max_tokens, mut sampler, policy } = job;
        let engine = |error: &dyn std::fmt::Display| Failure::new(Code::Engine, &error.to_string());
        let text = |error: &dyn std::fmt::Display| Failure::new(Code::Prompt, &error.to_string());
        let prompt = String::from_utf8(prompt).map_err(|error| text(&error))?;
        let held = self.cache.as_ref().map(|held| held.policy);
        let policy = policy.or(held.filter(|_| append)).unwrap_or(self.policy);
        if append && held != Some(policy) {
            return Err(Failure::new(Code::Policy, "the cache holds what another policy has kept; do not append"));
        }
        self.open(policy).map_err(|error| opening(&error))?;
        let Self { runtime, tokenizer, template, cache, say, wake, .. } = self;
        let Some(Held { session, tokens, .. }) = cache else { return Err(gone()) };
        let new = match form {
            Form::Raw => tokenizer.encode_plain(&prompt, !append),
            Form::Message => {
                template.render(&[Message::user(prompt)], true).and_then(|text| tokenizer.encode(&text, false))
            }
        };
        let new = new.map_err(|error| text(&error))?;
        if !append {
            session.clear(0);
            tokens.clear();
        }
        tokens.extend(new);
        let (needed, room) = (tokens.len(), session.plan().tokens);
        if needed > room {
            tokens.truncate(session.position(0));
            let detail = format!("{needed} tokens are more than the context of {room}");
            return Err(Failure::new(Code::Context, &detail));
        }
        let request =
            Request { slot: 0, tokens, sampler: &mut sampler, tokenizer, max_tokens, continues: form == Form::Raw };
        let reply = generate(runtime, session, request, &mut |event| {
            let said = match event {
                Event::Read { done, of } => Said::Read { done: done as u16, of: of as u16 },
                Event::Token { token, text } => Said::Token { token, text: text.to_owned() },
                Event::Rest(text) => Said::Rest(text.to_owned()),
            };
            let heard = say.0.put(said);
            wake();
            if heard && say.0.go_on() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        match reply {
            Ok(reply) => Ok(ending(&reply)),
            Err(ModelError::Interrupted) => {
                tokens.clear();
                Ok(Ending { end: End::Cancelled, prompt_tokens: 0, new_tokens: 0, prefill_us: 0, decode_us: 0 })
            }
            Err(error) => {
                // What was refused is as before, what failed is forgotten.
                tokens.truncate(session.position(0));
                Err(match error {
                    ModelError::Empty => Failure::new(Code::Prompt, &error.to_string()),
                    ModelError::Core(Error::Capacity { .. }) => Failure::new(Code::Context, &error.to_string()),
                    _ => engine(&error),
                })
            }
        }
    }
}

/// What the host is told where there is no cache of a policy.
fn opening(error: &LoadError) -> Failure {
    match error {
        LoadError::Design(_) => Failure::new(Code::Policy, &error.to_string()),
        _ => Failure::new(Code::Memory, &error.to_string()),
    }
}

fn ending(reply: &Reply) -> Ending {
    Ending {
        end: match reply.end {
            generate::End::Stop => End::Stop,
            generate::End::MaxTokens => End::MaxTokens,
            generate::End::ContextFull => End::ContextFull,
            generate::End::Interrupted => End::Cancelled,
        },
        prompt_tokens: reply.prompt_tokens as u32,
        new_tokens: reply.new_tokens as u32,
        prefill_us: reply.prefill.as_micros() as u64,
        decode_us: reply.decode.as_micros() as u64,
    }
}
