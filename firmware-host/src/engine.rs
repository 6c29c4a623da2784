//! The runtime as the [`Engine`] of a device: the model computes on a thread of its own, token by token.

use std::{
    ops::ControlFlow,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Sender},
    },
    thread,
};
use thinkey::{
    engine::{Device, DeviceError, Engine as Runtime, EngineOptions, Origin, Session},
    generate::{self, Event, Reply, Request, generate},
    model::{
        ModelError,
        transformer::{RECENT, WINDOW},
    },
    plan::{Planner, Workload},
    policy::{self, CacheDesign, Calibration, CalibrationError, DesignError},
    sample::{Sampler, Sampling},
    text::{ChatTemplate, Message, TextError, Tokenizer},
    weights::{Checkpoint, WeightsError},
};
use thinkey_core::{
    Error, Policy, Span,
    link::{
        Engine,
        device::Step,
        message::{self, Capabilities, Code, End, Ending, Failure, Form, MAX_TEXT, Start, Stats},
    },
    policy::PolicyError,
    snapshot::{Snapshot, SnapshotError},
    wire,
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
    /// More memory is needed than may be taken.
    #[error(
        "{context} tokens under {policy} need {needed} bytes with the weights, more than the {allowed} of --max-memory; give a \
         shorter --context or another --policy"
    )]
    Memory {
        /// Tokens of the sequence.
        context: usize,
        /// What the cache does.
        policy: Policy,
        /// Bytes planned.
        needed: usize,
        /// Bytes allowed.
        allowed: usize,
    },
    /// Memory is to be limited on a device that is not planned for.
    #[error("memory is planned on the processor only; leave out --max-memory, or compute there")]
    Unplanned,
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
    /// Most bytes of memory that may be taken, weights included, the program itself and a snapshot under way not; 0 where nobody
    /// sets a limit.
    pub budget: u64,
}

/// What the model's thread is given.
enum Work {
    Answer(Job),
    /// A snapshot is to be made; the number goes with what comes of it.
    Save(u32),
    /// Or taken.
    Restore(u32, Vec<u8>),
}

/// A completion.
struct Job {
    prompt: Vec<u8>,
    form: Form,
    append: bool,
    max_tokens: usize,
    sampler: Sampler,
    /// The device's, where nobody said; or that of what is appended to.
    policy: Option<Policy>,
}

/// What the model's thread says.
enum Said {
    Read { done: u16, of: u16 },
    Token { token: u32, text: String },
    Rest(String),
    Ended(Result<Ending, Failure>),
    Saved(u32, Result<Vec<u8>, Failure>),
    Restored(u32, Result<u32, Failure>),
}

/// Where the thread puts what it says: one thing at a time, and no token before the last is taken. So what is not read is not
/// computed; and where a completion is cancelled, one token more is told at most, which is the last of the sequence.
#[derive(Default)]
struct Mailbox {
    mail: Mutex<Mail>,
    freed: Condvar,
}

#[derive(Default)]
struct Mail {
    said: Option<Said>,
    cancelled: bool,
    /// One of the two sides is gone.
    closed: bool,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room and puts `said` there; false where nobody hears it.
    fn put(&self, said: Said) -> bool {
        let waits = |mail: &mut Mail| mail.said.is_some() && !mail.closed;
        let mut mail = self.freed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        if !mail.closed {
            mail.said = Some(said);
        }
        !mail.closed
    }

    /// Waits until what was put there is taken, or is the last that is asked for; says whether more is.
    fn go_on(&self) -> bool {
        let stops = |mail: &Mail| mail.closed || mail.cancelled;
        let waits = |mail: &mut Mail| mail.said.is_some() && !stops(mail);
        let mail = self.freed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        !stops(&mail)
    }

    /// What was said, if anything was.
    fn take(&self) -> Result<Option<Said>, Failure> {
        let mut mail = self.lock();
        let said = mail.said.take();
        if said.is_none() && mail.closed {
            return Err(gone());
        }
        self.freed.notify_one();
        Ok(said)
    }

    fn cancel(&self, cancelled: bool) {
        self.lock().cancelled = cancelled;
        self.freed.notify_one();
    }
}

/// Closes a mailbox, where one of its sides is dropped.
struct Side(Arc<Mailbox>);

impl Drop for Side {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.freed.notify_one();
    }
}

/// The runtime behind a device.
pub struct ModelEngine {
    name: String,
    line: String,
    context: usize,
    budget: u64,
    snapshots: bool,
    work: Sender<Work>,
    said: Side,
    stats: Arc<Mutex<Stats>>,
    /// The completion whose prompt is to come.
    next: Option<Job>,
    /// The last text, and how much of it is sent.
    text: String,
    sent: usize,
    /// The number of the last snapshot asked for or brought.
    number: u32,
    /// Its bytes, and what was said of them.
    bytes: Vec<u8>,
    expected: message::Snapshot,
}

impl std::fmt::Debug for ModelEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, line, context, .. } = self;
        write!(f, "ModelEngine {{ name: {name:?}, policy: {line}, context: {context} }}")
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
        let (work, given) = mpsc::channel();
        let (mailbox, stats) = (Arc::<Mailbox>::default(), Arc::default());
        let model = checkpoint.fingerprint();
        let mut worker = Worker {
            checkpoint,
            calibration,
            runtime,
            options: options.engine,
            tokenizer,
            template,
            context,
            budget: options.budget,
            policy,
            model,
            cache: None,
            say: Side(Arc::clone(&mailbox)),
            wake: Box::new(wake),
            stats: Arc::clone(&stats),
        };
        worker.open(policy)?;
        thread::spawn(move || {
            for work in given {
                if worker.work(work).is_break() {
                    break;
                }
            }
        });
        Ok(Self {
            name,
            line: policy.to_string(),
            context,
            budget: options.budget,
            snapshots: options.engine.device == Device::Ndarray,
            work,
            said: Side(mailbox),
            stats,
            next: None,
            text: String::new(),
            sent: 0,
            number: 0,
            bytes: Vec::new(),
            expected: message::Snapshot::default(),
        })
    }

    fn give(&self, work: Work) -> Result<(), Failure> {
        self.work.send(work).map_err(|_| gone())
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

/// What the host is told of a snapshot that cannot be.
fn refused(error: &SnapshotError) -> Failure {
    let code = match error {
        SnapshotError::Version { .. }
        | SnapshotError::Model
        | SnapshotError::Policy { .. }
        | SnapshotError::Shape { .. } => Code::Foreign,
        SnapshotError::Context { .. } => Code::Context,
        SnapshotError::Memory { .. } => Code::Memory,
        SnapshotError::Device | SnapshotError::Empty => Code::Unsupported,
        _ => Code::Damaged,
    };
    Failure::new(code, &error.to_string())
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
            snapshots: self.snapshots,
        }
    }

    fn start(&mut self, start: &Start<'_>) -> Result<(), Failure> {
        let policy = match start.policy {
            "" => None,
            line => Some(line.parse().map_err(|error: PolicyError| Failure::new(Code::Policy, &error.to_string()))?),
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
        self.said.0.cancel(false);
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
        self.give(Work::Answer(job))
    }

    fn step(&mut self) -> Result<Step<'_>, Failure> {
        if self.sent < self.text.len() {
            let part = self.part();
            return Ok(Step::Text { text: &self.text.as_bytes()[part] });
        }
        match self.said.0.take()? {
            // Of a snapshot that nobody asks for any more.
            None | Some(Said::Saved(..) | Said::Restored(..)) => Ok(Step::Pending),
            Some(Said::Read { done, of }) => Ok(Step::Read { done, of }),
            Some(Said::Ended(result)) => result.map(Step::Ended),
            Some(Said::Token { token, text }) => {
                (self.text, self.sent) = (text, 0);
                let part = self.part();
                Ok(Step::Token { token, text: &self.text.as_bytes()[part] })
            }
            Some(Said::Rest(text)) => {
                (self.text, self.sent) = (text, 0);
                let part = self.part();
                Ok(Step::Text { text: &self.text.as_bytes()[part] })
            }
        }
    }

    fn cancel(&mut self) {
        self.next = None;
        self.said.0.cancel(true);
    }

    fn stats(&self) -> Stats {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&mut self) -> Result<(), Failure> {
        self.number = self.number.wrapping_add(1);
        self.bytes = Vec::new();
        self.give(Work::Save(self.number))
    }

    fn saved(&mut self) -> Result<Option<message::Snapshot>, Failure> {
        match self.said.0.take()? {
            Some(Said::Saved(number, saved)) if number == self.number => {
                self.bytes = saved?;
                let bytes = u32::try_from(self.bytes.len())
                    .map_err(|_| Failure::new(Code::Memory, "the snapshot has more bytes than a message can say"))?;
                Ok(Some(message::Snapshot { bytes, checksum: wire::checksum(&self.bytes) }))
            }
            _ => Ok(None),
        }
    }

    fn read_snapshot(&mut self, offset: u32, out: &mut [u8]) -> usize {
        let rest = self.bytes.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(out.len());
        out[..len].copy_from_slice(&rest[..len]);
        if len == rest.len() {
            // Read once.
            self.bytes = Vec::new();
        }
        len
    }

    fn restore(&mut self, snapshot: message::Snapshot) -> Result<(), Failure> {
        if !self.snapshots {
            return Err(refused(&SnapshotError::Device));
        }
        let mut bytes = Vec::new();
        let memory = |_| refused(&SnapshotError::Memory { bytes: snapshot.bytes.into() });
        bytes.try_reserve_exact(snapshot.bytes as usize).map_err(memory)?;
        (self.bytes, self.expected) = (bytes, snapshot);
        Ok(())
    }

    fn write_snapshot(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() < self.expected.bytes as usize {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.bytes);
        if wire::checksum(&bytes) != self.expected.checksum {
            return Err(Failure::new(Code::Damaged, "the snapshot is not what was said to come"));
        }
        self.number = self.number.wrapping_add(1);
        self.give(Work::Restore(self.number, bytes))
    }

    fn restored(&mut self) -> Result<Option<u32>, Failure> {
        // One of no bytes at all was never written.
        if self.expected.bytes == 0 {
            return Err(refused(&SnapshotError::Magic));
        }
        match self.said.0.take()? {
            Some(Said::Restored(number, restored)) if number == self.number => restored.map(Some),
            _ => Ok(None),
        }
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
    options: EngineOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    context: usize,
    budget: u64,
    /// Where a request does not say.
    policy: Policy,
    /// Its fingerprint.
    model: [u8; 16],
    cache: Option<Held>,
    say: Side,
    wake: Box<dyn Fn() + Send>,
    stats: Arc<Mutex<Stats>>,
}

impl Worker {
    /// The design of a policy, if there is memory for it.
    fn design(&self, policy: Policy) -> Result<CacheDesign, LoadError> {
        let planner = Planner::new(&self.checkpoint, self.calibration.as_ref());
        let design = planner.design(policy)?;
        if self.budget == 0 {
            return Ok(design);
        }
        if self.options.device != Device::Ndarray {
            return Err(LoadError::Unplanned);
        }
        let (context, threads) = (self.context, self.options.threads);
        let workload = Workload { context, prompt: None, slots: 1, policy, recent: RECENT, window: WINDOW, threads };
        let (needed, allowed) = (planner.plan(&workload)?.total(), self.budget as usize);
        if needed > allowed {
            return Err(LoadError::Memory { context, policy, needed, allowed });
        }
        Ok(design)
    }

    /// Has a cache of `policy`.
    fn open(&mut self, policy: Policy) -> Result<(), LoadError> {
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
    fn work(&mut self, work: Work) -> ControlFlow<()> {
        let said = match work {
            Work::Answer(job) => Said::Ended(self.answer(job)),
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
