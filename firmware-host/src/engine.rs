//! The runtime as the [`Engine`] of a device: the model computes on a thread of its own, token by token.

mod mailbox;
mod worker;

use mailbox::{Mailbox, Said, Side};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Sender},
    },
    thread,
};
use thinkey::{
    engine::{DeviceError, Engine as Runtime, EngineOptions},
    machine::Memory,
    model::ModelError,
    policy::{self, Calibration, CalibrationError, DesignError},
    sample::{Sampler, Sampling},
    text::{TextError, Tokenizer},
    weights::{Checkpoint, WeightsError},
};
use thinkey_core::{
    Policy,
    link::{
        engine::{Engine, Step},
        message::{self, Capabilities, Code, Failure, Form, MAX_TEXT, Start, Stats},
    },
    policy::PolicyError,
    snapshot::SnapshotError,
    wire,
};
use worker::{Job, Work, Worker};

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
        policy: Box<Policy>,
        /// Bytes planned.
        needed: usize,
        /// Bytes allowed.
        allowed: usize,
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
    /// Most bytes of memory that may be taken, weights included, the program itself and a snapshot under way not; 0 where nobody
    /// sets a limit.
    pub budget: u64,
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
        let snapshots = worker.cache.as_ref().is_some_and(|held| held.session.takes_snapshots());
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
            snapshots,
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
        self.give(Work::Answer(Box::new(job)))
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

    fn free_bytes(&self) -> Option<u64> {
        Some(Memory::read()?.available as u64)
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
