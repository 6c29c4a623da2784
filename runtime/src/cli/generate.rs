//! `thinkey generate`: one answer to one prompt.

use super::{CliError, inspect::lambda, pull::pull};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;
use std::{
    io::{Read, Write},
    path::PathBuf,
    time::Instant,
};
use thinkey::{
    engine::{Device, Engine, SessionOptions},
    model::transformer::WINDOW,
    sample::{Sampler, Sampling},
    store::{DEFAULT, Store},
    text::{Message, Tokenizer},
    weights::Checkpoint,
};
use thinkey_core::{Lambda, StorageKind};

/// Arguments of `thinkey generate`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The question or instruction; with none and no --file, standard input is read
    prompt: Option<String>,
    /// A text that is put before the prompt
    #[arg(long)]
    file: Option<PathBuf>,
    /// A model in the store (pulled if it is missing) or a path
    #[arg(long, default_value = DEFAULT.id)]
    model: String,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Share of key channels to prune, 0 ≤ λ < 1
    #[arg(long, default_value = "0.5", value_parser = lambda)]
    lambda: Lambda,
    /// Newest tokens kept whole
    #[arg(long, default_value_t = 32)]
    recent: usize,
    /// How keys and values are stored
    #[arg(long, default_value = "f16")]
    kv_type: KvType,
    /// Most tokens to answer with
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// Threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
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
    /// Print speed and cache bytes after the answer
    #[arg(long)]
    stats: bool,
    /// Print answer and statistics as JSON
    #[arg(long)]
    json: bool,
}

/// How keys and values are stored.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum KvType {
    F32,
    F16,
}

impl From<KvType> for StorageKind {
    fn from(kind: KvType) -> Self {
        match kind {
            KvType::F32 => Self::F32,
            KvType::F16 => Self::F16,
        }
    }
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let mut sampler = Sampler::new(Sampling {
        repetition_penalty: arguments.repetition_penalty,
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        min_p: arguments.min_p,
        seed: arguments.seed,
    })?;
    let prompt = prompt(arguments)?;
    let checkpoint = Checkpoint::open(&pull(&Store::open()?, &arguments.model)?)?;
    let tokenizer = Tokenizer::new(checkpoint.tokenizer()?)?;
    let ids = if arguments.raw {
        tokenizer.encode_plain(&prompt, true)?
    } else {
        tokenizer.encode(&tokenizer.chat_template()?.render(&[Message::user(prompt)], true)?, false)?
    };
    let threads = arguments.threads.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
    let mut model = Engine::load(&checkpoint, Device::Ndarray, threads, &mut |_, _| {})?;
    let config = model.config().clone();
    let tokens = ids.len() + arguments.max_tokens;
    if tokens > config.context {
        return Err(CliError::Context { prompt: ids.len(), answer: arguments.max_tokens, context: config.context });
    }
    let kind = match arguments.kv_type {
        KvType::F32 => StorageKind::F32,
        KvType::F16 => StorageKind::F16,
    };
    let plan = config.cache_plan(1, tokens, arguments.recent, kind);
    let mut session =
        model.session(SessionOptions { plan, window: WINDOW }, |_, _| arguments.lambda.kept(config.head_dim))?;

    let bar = ProgressBar::new(config.layers as u64).with_style(
        ProgressStyle::with_template("reading {bar:30} {pos}/{len} layers {eta}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let start = Instant::now();
    let mut logits = model.prefill(&mut session, 0, &ids, &mut |done, _| {
        bar.set_position(done as u64);
        std::ops::ControlFlow::Continue(())
    })?;
    let prefill = start.elapsed().as_secs_f64();
    bar.finish_and_clear();

    let mut out = std::io::stdout().lock();
    let mut seen = ids.clone();
    let mut words = tokenizer.detokeniser();
    let mut answer = String::new();
    let start = Instant::now();
    let mut new = 0;
    loop {
        let token = sampler.sample(logits, &seen);
        if new == arguments.max_tokens || tokenizer.stop_tokens().contains(&token) {
            break;
        }
        new += 1;
        seen.push(token);
        let text = words.push(token);
        if arguments.json {
            answer.push_str(text);
        } else {
            write!(out, "{text}")?;
            out.flush()?;
        }
        if new == arguments.max_tokens {
            break;
        }
        logits = model.decode(&mut session, &[0], &[token])?;
    }
    let decode = start.elapsed().as_secs_f64();
    let rest = words.finish();
    let cache = &session;
    let (whole, planned, measured) = (plan.whole_bytes(), cache.planned().total(), cache.allocated());
    let speed = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let (read, written) = (speed(ids.len(), prefill), speed(new.saturating_sub(1), decode));
    if arguments.json {
        answer.push_str(rest);
        let report = json!({
            "answer": answer,
            "tokens": { "prompt": ids.len(), "new": new },
            "tokens_per_second": { "prefill": read, "decode": written },
            "cache_bytes": { "whole": whole, "planned": planned, "measured": measured },
        });
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{rest}")?;
    if arguments.stats {
        let bytes = |bytes: usize| HumanBytes(bytes as u64);
        writeln!(out, "\n{} prompt tokens at {read:.0}/s, {new} new at {written:.0}/s", ids.len())?;
        writeln!(
            out,
            "cache for {tokens} tokens: whole {}, planned {}, measured {}; saved {:.1}%",
            bytes(whole),
            bytes(planned),
            bytes(measured),
            100.0 * (1.0 - measured as f64 / whole as f64)
        )?;
    }
    Ok(())
}

/// The text to answer: the file, then the prompt; standard input where neither is given.
fn prompt(arguments: &Arguments) -> Result<String, CliError> {
    let mut text = String::new();
    match (&arguments.file, &arguments.prompt) {
        (None, None) => {
            std::io::stdin().read_to_string(&mut text)?;
        }
        (file, prompt) => {
            if let Some(path) = file {
                text = std::fs::read_to_string(path).map_err(|cause| CliError::Prompt { path: path.clone(), cause })?;
                text.push_str("\n\n");
            }
            text.push_str(prompt.as_deref().unwrap_or_default());
        }
    }
    Ok(text)
}
