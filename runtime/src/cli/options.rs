//! What generate and chat have in common: options of the model, of its cache and of sampling.

use super::{CliError, budget::LambdaChoice, progress, pull::pull};
use clap::{
    Parser,
    builder::{PossibleValuesParser, TypedValueParser},
};
use std::{fs, num::NonZeroUsize, path::PathBuf, thread};
use thinkey::{
    engine::{Activations, Device, Engine, EngineOptions, Session},
    model::{
        ModelConfig,
        transformer::{RECENT, WINDOW},
    },
    plan::{Size, Workload},
    policy::{self, CacheDesign},
    sample::{Sampler, Sampling},
    store::{self, DEFAULT},
    text::{ChatTemplate, Tokenizer},
    weights::Checkpoint,
};
use thinkey_core::{Policy, StorageKind, policy::Store};

/// Options of the model, of its cache and of sampling.
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    pub model: ModelOptions,
    #[command(flatten)]
    pub cache: CacheOptions,
    #[command(flatten)]
    pub sampling: SamplingOptions,
}

/// Which model, and where it is computed.
#[derive(clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelOptions {
    /// A model in the store (pulled if it is missing) or a path
    #[arg(long, default_value = DEFAULT.id)]
    model: String,
    /// A chat template (Jinja) in place of the model's
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Where the model is computed: ndarray (the processor) or cuda
    #[arg(long, default_value_t)]
    device: Device,
    #[command(flatten)]
    processor: ProcessorOptions,
}

/// How the processor computes.
#[derive(clap::Args)]
pub struct ProcessorOptions {
    /// Threads on the processor [default: all cores]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// How the processor's linear layers read their input: as it is, or, faster, in eight bits
    #[arg(long, default_value_t, value_enum)]
    activations: ActivationType,
}

/// In what numbers linear layers read their input.
#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum ActivationType {
    Exact,
    #[default]
    Int8,
}

/// How the cache is stored.
#[derive(clap::Args)]
#[command(next_help_heading = "Cache")]
pub struct CacheOptions {
    #[command(flatten)]
    policy: PolicyOptions,
    /// Share of key channels to prune in place of the policy's, 0 ≤ λ < 1; auto is the smallest that fits --max-memory
    #[arg(long, value_name = "LAMBDA")]
    lambda: Option<LambdaChoice>,
    /// Newest tokens kept whole
    #[arg(long, default_value_t = RECENT)]
    recent: usize,
    /// Newest queries of a prompt that score its channels
    #[arg(long, default_value_t = NonZeroUsize::new(WINDOW).expect("some queries score"))]
    window: NonZeroUsize,
    /// Tokens the cache is planned for [default: generate: prompt and answer; chat: the model's context, at most 8192]
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Refuse to load what would take more memory, weights included, as 2GiB or 500MB: the total of `thinkey plan`, on top
    /// of which come the program itself and the tokenizer
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<Size>,
}

/// What the cache does.
#[derive(clap::Args)]
pub struct PolicyOptions {
    /// What the cache does: a preset (full, think, quality, balanced, small) and slots that differ from it, as
    /// `balanced,lambda=.6,values=int8` [default: balanced, or what the model and the device allow of it]
    #[arg(long, value_name = "POLICY")]
    policy: Option<Policy>,
    /// How keys and values are stored in place of the policy's; the newest tokens of quantised ones stay in f16
    #[arg(long, value_parser = kv_type())]
    kv_type: Option<Store>,
}

impl PolicyOptions {
    /// The policy asked for, or else the default for a model of `config` that is `calibrated` or not, on `device`.
    pub fn policy(&self, config: &ModelConfig, calibrated: bool, device: Device) -> Policy {
        stored(self.policy.unwrap_or_else(|| policy::default(config.head_dim, calibrated, device)), self.kv_type)
    }
}

/// `policy` with keys and values stored as `kind`, where it is given.
pub fn stored(policy: Policy, kind: Option<Store>) -> Policy {
    match kind {
        Some(kind) => Policy { keys: kind, values: kind, ..policy },
        None => policy,
    }
}

/// Reads how numbers are stored.
pub fn kv_type() -> impl TypedValueParser<Value = Store> {
    let kinds =
        Store::ALL.into_iter().filter(|&kind| !kind.turns() && !kind.mixed() && StorageKind::try_from(kind).is_ok());
    PossibleValuesParser::new(kinds.map(Store::name)).map(|name| {
        let kind = Store::ALL.into_iter().find(|kind| kind.name() == name);
        kind.unwrap_or_default()
    })
}

/// How the next token is chosen.
#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingOptions {
    /// Most tokens of an answer
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Choose from the K likeliest tokens; 0 is off
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Choose from the likeliest tokens that hold this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Choose from tokens with at least this share of the likeliest one's probability
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Make tokens that were seen less likely; 1 is off
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Same seed, same answer
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Default for Options {
    /// The defaults of the command line.
    fn default() -> Self {
        #[derive(Parser)]
        struct Defaults {
            #[command(flatten)]
            options: Options,
        }
        Defaults::parse_from(["thinkey"]).options
    }
}

impl Options {
    /// What one sequence of `context` tokens is, of which at most `prompt` are fed at once.
    pub fn workload(&self, context: usize, prompt: Option<usize>, policy: Policy) -> Workload {
        let (recent, window) = (self.cache.recent, self.cache.window());
        let threads = threads(self.model.processor.threads);
        Workload { context, prompt, slots: 1, policy, recent, window, threads }
    }
}

/// The threads asked for, or as many as the machine has cores.
pub fn threads(asked: Option<NonZeroUsize>) -> usize {
    asked.or_else(|| thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
}

impl ModelOptions {
    /// Where the model is computed.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Finds the model, pulling it if need be, and opens its headers and tokenizer.
    pub fn open(&self) -> Result<(Checkpoint, Tokenizer), CliError> {
        let checkpoint = Checkpoint::open(&pull(&store::Store::open()?, &self.model)?)?;
        let tokenizer = Tokenizer::new(checkpoint.tokenizer()?)?;
        Ok((checkpoint, tokenizer))
    }

    /// The template of the option, or else the model's.
    pub fn template(&self, tokenizer: &Tokenizer) -> Result<ChatTemplate, CliError> {
        Ok(match &self.chat_template {
            Some(path) => tokenizer.chat_template_from(
                fs::read_to_string(path).map_err(|cause| CliError::Read { path: path.clone(), cause })?,
            )?,
            None => tokenizer.chat_template()?,
        })
    }

    /// Loads the weights.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<Engine, CliError> {
        let options = self.processor.engine(self.device);
        let bar = progress::layers("loading", checkpoint.config().layers);
        let engine = Engine::load(checkpoint, options, &mut |done, _| bar.set_position(done as u64));
        bar.finish_and_clear();
        Ok(engine?)
    }
}

impl ProcessorOptions {
    /// An engine on `device`.
    pub fn engine(&self, device: Device) -> EngineOptions {
        let threads = threads(self.threads);
        let activations = match self.activations {
            ActivationType::Exact => Activations::Exact,
            ActivationType::Int8 => Activations::Int8,
        };
        EngineOptions { device, threads, activations }
    }
}

impl CacheOptions {
    /// The tokens of `--context`, if it is given, for a model with a context of `context` tokens.
    ///
    /// # Errors
    /// [`CliError::LargeContext`] where the model was not made for so many.
    pub fn context(&self, context: usize) -> Result<Option<usize>, CliError> {
        match self.context {
            Some(planned) if planned > context => Err(CliError::LargeContext { planned, context }),
            planned => Ok(planned),
        }
    }

    /// One empty sequence of at most `tokens` tokens.
    pub fn session(&self, engine: &Engine, tokens: usize, design: &CacheDesign) -> Result<Session, CliError> {
        let options = design.options(1, tokens, self.recent, self.window.get());
        Ok(engine.session(options, |layer, head| design.kept(layer, head))?)
    }

    /// The policy, its λ aside.
    pub fn policy(&self, config: &ModelConfig, calibrated: bool, device: Device) -> Policy {
        self.policy.policy(config, calibrated, device)
    }

    /// λ, or how to find it, where the policy's is not meant.
    pub fn lambda(&self) -> Option<LambdaChoice> {
        self.lambda
    }

    /// Most bytes that may be taken.
    pub fn max_memory(&self) -> Option<usize> {
        self.max_memory.map(|Size(bytes)| bytes as usize)
    }

    /// W.
    pub fn window(&self) -> usize {
        self.window.get()
    }

    /// R.
    pub fn recent(&self) -> usize {
        self.recent
    }
}

impl SamplingOptions {
    /// A sampler that has chosen nothing yet.
    pub fn sampler(&self) -> Result<Sampler, CliError> {
        Ok(Sampler::new(Sampling {
            repetition_penalty: self.repetition_penalty,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
        })?)
    }
}
