//! The runtime as the [`Engine`] of a device: the model computes on a thread of its own, token by token.

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{self, Receiver, Sender, SyncSender, TryRecvError},
    },
    thread,
};
use thinkey::{
    engine::{DeviceError, Engine as Runtime, EngineOptions, Session},
    generate::{self, Event, Reply, Request, generate},
    model::{
        ModelError,
        transformer::{RECENT, WINDOW},
    },
    plan::Planner,
    policy::{self, Calibration, CalibrationError, DesignError},
    sample::{Sampler, Sampling},
    text::{ChatTemplate, Message, TextError, Tokenizer},
    weights::{Checkpoint, WeightsError},
};
use thinkey_core::{
    Error, Policy, Span,
    link::{
        Engine,
        device::Step,
        message::{Capabilities, Code, End, Ending, Failure, Form, MAX_TEXT, Snapshot, Start, Stats},
    },
};

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its weights.
    #[error(transparent)]
    Checkpoint(#[from] WeightsError),
    /// Its tokenizer or template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Its calibration.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// The policy, for it.
    #[error(transparent)]
    Design(#[from] DesignError),
    /// The engine.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device that it is computed on.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The context asked for is longer than the model's.
    #[error("a context of {context} tokens is longer than the model's {most}; give at most that")]
    Context {
        /// Asked for.
        context: usize,
        /// The model's.
        most: usize,
    },
}

/// What a device runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// How the model is computed.
    pub engine: EngineOptions,
    /// What the cache does where a request does not say; the model's default where nobody does.
    pub policy: Option<Policy>,
    /// Tokens of a sequence; at most 8192 of the model's where nobody says.
    pub context: Option<usize>,
    /// Bytes of memory that the device says it may take.
    pub budget: u64,
}

/// A completion that the model's thread is given.
struct Job {
    prompt: Vec<u8>,
    form: Form,
    append: bool,
    max_tokens: usize,
    sampler: Sampler,
    policy: Policy,
}

/// What the model's thread says.
enum Said {
    Read { done: u16, of: u16 },
    Token { token: u32, text: String },
    Rest(String),
    Ended(Result<Ending, Failure>),
}

/// The runtime behind a device.
#[derive(Debug)]
pub struct ModelEngine {
    name: String,
    line: String,
    context: usize,
    budget: u64,
    policy: Policy,
    jobs: Sender<Job>,
    said: Receiver<Said>,
    cancelled: Arc<AtomicBool>,
    stats: Arc<Mutex<Stats>>,
    /// The completion whose prompt is to come.
    next: Option<Job>,
    /// The last text, and how much of it is sent.
    text: String,
    sent: usize,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl ModelEngine {
    /// Loads the model of `checkpoint`. `wake` is called, on the model's thread, where there is something to
    /// [step](Engine::step) for.
    ///
    /// # Errors
    /// [`LoadError`], before the thread begins.
    pub fn load(checkpoint: Checkpoint, options: Options, wake: impl Fn() + Send + 'static) -> Result<Self, LoadError> {
        let config = checkpoint.config();
        let most = config.context;
        let context = options.context.unwrap_or(most.min(8192));
        if context > most {
            return Err(LoadError::Context { context, most });
        }
        let name = config.name.clone().unwrap_or_default();
        let calibration = Calibration::find(&checkpoint)?;
        let policy = options
            .policy
            .unwrap_or_else(|| policy::default(config.head_dim, calibration.is_some(), options.engine.device));
        let tokenizer = Tokenizer::new(checkpoint.tokenizer()?)?;
        let template = tokenizer.chat_template()?;
        let runtime = Runtime::load(&checkpoint, options.engine, &mut |_, _| {})?;
        let (jobs, work) = mpsc::channel();
        // One token ahead of the line, no more: what is not read is not computed.
        let (say, said) = mpsc::sync_channel(1);
        let (cancelled, stats) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut worker = Worker {
            checkpoint,
            calibration,
            runtime,
            tokenizer,
            template,
            context,
            cache: None,
            say,
            wake: Box::new(wake),
            cancelled: Arc::clone(&cancelled),
            stats: Arc::clone(&stats),
        };
        worker.open(policy)?;
        thread::spawn(move || {
            for job in work {
                if worker.complete(job).is_break() {
                    break;
                }
            }
        });
        let (line, budget, text) = (policy.to_string(), options.budget, String::new());
        Ok(Self { name, line, context, budget, policy, jobs, said, cancelled, stats, next: None, text, sent: 0 })
    }

    /// The next part of the text that is being sent, at most a message's.
    fn part(&mut self) -> std::ops::Range<usize> {
        let start = self.sent;
        let mut end = self.text.len().min(start + MAX_TEXT);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        self.sent = end;
        start..end
    }
}

fn gone() -> Failure {
    Failure::new(Code::Engine, "the model's thread has ended")
}

impl Engine for ModelEngine {
    fn capabilities(&self) -> Capabilities<'_> {
        Capabilities {
            model: &self.name,
            context: self.context as u32,
            budget: self.budget,
            policy: &self.line,
            policies: true,
            snapshots: false,
        }
    }

    fn start(&mut self, start: &Start<'_>) -> Result<(), Failure> {
        let policy = match start.policy {
            "" => self.policy,
            line => line
                .parse()
                .map_err(|error: thinkey_core::policy::PolicyError| Failure::new(Code::Policy, &error.to_string()))?,
        };
        let s = start.sampling;
        let sampler = Sampler::new(Sampling {
            repetition_penalty: s.repetition_penalty,
            temperature: s.temperature,
            top_k: s.top_k as usize,
            top_p: s.top_p,
            min_p: s.min_p,
            seed: s.seed,
        })
        .map_err(|error| Failure::new(Code::Sampling, &error.to_string()))?;
        if start.append && start.form == Form::Message {
            return Err(Failure::new(Code::Unsupported, "what is appended is raw text; send Form::Raw"));
        }
        self.cancelled.store(false, SeqCst);
        let (form, append, max_tokens) = (start.form, start.append, start.max_tokens as usize);
        self.next = Some(Job { prompt: Vec::new(), form, append, max_tokens, sampler, policy });
        Ok(())
    }

    fn prompt(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if let Some(job) = &mut self.next {
            // A token is a byte at least in no vocabulary; most of one that is longer than any context is refused early.
            if job.prompt.len() + bytes.len() > self.context.saturating_mul(256) {
                return Err(Failure::new(Code::Context, "the prompt is longer than any text of the context"));
            }
            job.prompt.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn begin(&mut self) -> Result<(), Failure> {
        self.text.clear();
        self.sent = 0;
        let job = self.next.take().ok_or_else(gone)?;
        self.jobs.send(job).map_err(|_| gone())
    }

    fn step(&mut self) -> Result<Step<'_>, Failure> {
        if self.sent < self.text.len() {
            let part = self.part();
            return Ok(Step::Text { text: &self.text.as_bytes()[part] });
        }
        match self.said.try_recv() {
            Err(TryRecvError::Empty) => Ok(Step::Pending),
            Err(TryRecvError::Disconnected) => Err(gone()),
            Ok(Said::Read { done, of }) => Ok(Step::Read { done, of }),
            Ok(Said::Ended(result)) => result.map(Step::Ended),
            Ok(Said::Token { token, text }) => {
                (self.text, self.sent) = (text, 0);
                let part = self.part();
                Ok(Step::Token { token, text: &self.text.as_bytes()[part] })
            }
            Ok(Said::Rest(text)) => {
                (self.text, self.sent) = (text, 0);
                let part = self.part();
                Ok(Step::Text { text: &self.text.as_bytes()[part] })
            }
        }
    }

    fn cancel(&mut self) {
        self.next = None;
        self.cancelled.store(true, SeqCst);
    }

    fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&mut self) -> Result<Snapshot, Failure> {
        Err(Failure::new(Code::Unsupported, "this device takes no snapshots"))
    }

    fn read_snapshot(&mut self, _: u32, _: &mut [u8]) -> usize {
        0
    }

    fn restore(&mut self, _: Snapshot) -> Result<(), Failure> {
        Err(Failure::new(Code::Unsupported, "this device takes no snapshots"))
    }

    fn write_snapshot(&mut self, _: &[u8]) -> Result<(), Failure> {
        Err(Failure::new(Code::Unsupported, "this device takes no snapshots"))
    }

    fn restored(&mut self) -> Result<u32, Failure> {
        Err(Failure::new(Code::Unsupported, "this device takes no snapshots"))
    }
}

/// The cache that the thread has, for a policy.
struct Held {
    policy: Policy,
    session: Session,
    /// As [`Request::tokens`].
    tokens: Vec<u32>,
}

/// The model's thread.
struct Worker {
    checkpoint: Checkpoint,
    calibration: Option<Calibration>,
    runtime: Runtime,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    context: usize,
    cache: Option<Held>,
    say: SyncSender<Said>,
    wake: Box<dyn Fn() + Send>,
    cancelled: Arc<AtomicBool>,
    stats: Arc<Mutex<Stats>>,
}

impl Worker {
    /// Has a cache of `policy`.
    fn open(&mut self, policy: Policy) -> Result<(), LoadError> {
        if self.cache.as_ref().is_some_and(|held| held.policy == policy) {
            return Ok(());
        }
        let design = Planner::new(&self.checkpoint, self.calibration.as_ref()).design(policy)?;
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

    /// Answers; breaks where nobody hears it.
    fn complete(&mut self, job: Job) -> ControlFlow<()> {
        let result = self.answer(job);
        self.count();
        let said = self.say.send(Said::Ended(result));
        (self.wake)();
        if said.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    fn answer(&mut self, job: Job) -> Result<Ending, Failure> {
        let Job { prompt, form, append, max_tokens, mut sampler, policy } = job;
        let engine = |error: &dyn std::fmt::Display| Failure::new(Code::Engine, &error.to_string());
        let text = |error: &dyn std::fmt::Display| Failure::new(Code::Prompt, &error.to_string());
        let prompt = String::from_utf8(prompt).map_err(|error| text(&error))?;
        if append && self.cache.as_ref().is_none_or(|held| held.policy != policy) {
            return Err(Failure::new(Code::Policy, "the cache holds what another policy has kept; do not append"));
        }
        self.open(policy).map_err(|error| match &error {
            LoadError::Design(_) => Failure::new(Code::Policy, &error.to_string()),
            _ => Failure::new(Code::Memory, &error.to_string()),
        })?;
        let Self { runtime, tokenizer, template, cache, say, wake, cancelled, .. } = self;
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
        let cancels = || cancelled.load(SeqCst);
        let tell = |said| {
            let heard = say.send(said).is_ok();
            wake();
            if heard { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let request =
            Request { slot: 0, tokens, sampler: &mut sampler, tokenizer, max_tokens, continues: form == Form::Raw };
        let reply = generate(runtime, session, request, &mut |event| {
            let flow = match event {
                Event::Read { done, of } => tell(Said::Read { done: done as u16, of: of as u16 }),
                Event::Token { token, text } => tell(Said::Token { token, text: text.to_owned() }),
                Event::Rest(text) => tell(Said::Rest(text.to_owned())),
            };
            // What is told is counted, so this comes after.
            if cancels() { ControlFlow::Break(()) } else { flow }
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
