//! `thinkey bench`: how fast a model runs on this machine.

use super::{
    CliError,
    inspect::lambda,
    options::{KvType, ProcessorOptions},
    progress,
    pull::pull,
};
use serde_json::json;
use std::io::Write;
use thinkey::{
    bench::{self, BenchOptions, BenchStep, DecodeRow, PrefillRow, Spread},
    engine::{Device, Engine, SessionOptions},
    model::transformer::WINDOW,
    store::{DEFAULT, Store},
    weights::Checkpoint,
};
use thinkey_core::{Lambda, StorageKind};
use thinkey_kernels::cpu::{bandwidth::read_bandwidth, pool::Pool, simd::Level};

/// Bytes that the bandwidth is measured over: more than any cache holds.
const BUFFER: usize = 512 << 20;

/// Arguments of `thinkey bench`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A model in the store (pulled if it is missing) or a path
    #[arg(default_value = DEFAULT.id)]
    model: String,
    /// Prompt lengths to prefill
    #[arg(long, value_delimiter = ',', default_value = "512,2048,4096")]
    prefill: Vec<usize>,
    /// Tokens in the cache when decoding begins
    #[arg(long, value_delimiter = ',', default_value = "0,1024,2048,4096,8000")]
    depth: Vec<usize>,
    /// Leave prefill out
    #[arg(long)]
    no_prefill: bool,
    /// Leave decode out
    #[arg(long)]
    no_decode: bool,
    /// Tokens decoded in each repetition
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    tokens: u16,
    /// Repetitions of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// Share of key channels to prune, 0 ≤ λ < 1
    #[arg(long, default_value = "0.5", value_parser = lambda)]
    lambda: Lambda,
    /// Newest tokens kept whole
    #[arg(long, default_value_t = 32)]
    recent: usize,
    /// How keys and values are stored
    #[arg(long, default_value = "f16")]
    kv_type: KvType,
    /// Where to compute
    #[arg(long, default_value_t = Device::Ndarray)]
    device: Device,
    #[command(flatten)]
    processor: ProcessorOptions,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let path = pull(&Store::open()?, &arguments.model)?;
    let checkpoint = Checkpoint::open(&path)?;
    let engine_options = arguments.processor.engine(arguments.device);
    let threads = engine_options.threads;
    let activations = engine_options.activations.name();
    let mut engine = Engine::load(&checkpoint, engine_options, &mut |_, _| {})?;
    let options = BenchOptions {
        prefill: if arguments.no_prefill { Vec::new() } else { arguments.prefill.clone() },
        depths: if arguments.no_decode { Vec::new() } else { arguments.depth.clone() },
        tokens: usize::from(arguments.tokens),
        repetitions: usize::from(arguments.repetitions),
    };
    let kind = StorageKind::from(arguments.kv_type);
    let (needed, context) = (bench::tokens_needed(&options), engine.config().context);
    if needed > context {
        return Err(CliError::Depth { needed, context });
    }
    let head_dim = engine.config().head_dim;
    let plan = engine.config().cache_plan(1, needed, arguments.recent, kind);
    let mut session =
        engine.session(SessionOptions { plan, window: WINDOW }, |_, _| arguments.lambda.kept(head_dim))?;

    let bar = progress::spinner();
    let mut tell = |step| {
        bar.tick();
        bar.set_message(match step {
            BenchStep::Prefill(tokens) => format!("prefill of {tokens} tokens"),
            BenchStep::Decode(depth) => format!("decode at depth {depth}"),
        });
    };
    let prefill = bench::prefill(&mut engine, &mut session, &options, &mut tell)?;
    let decode = bench::decode(&mut engine, &mut session, &checkpoint, arguments.lambda, &options, &mut tell)?;
    bar.set_message("memory bandwidth");
    let pool = Pool::new(threads).map_err(thinkey::model::ModelError::from)?;
    let bandwidth = read_bandwidth(&pool, Level::best(), BUFFER, 5);
    bar.finish_and_clear();

    let mut out = std::io::stdout().lock();
    let lambda = f64::from(arguments.lambda.per_mille()) / 1000.0;
    let level = Level::best().name();
    if arguments.json {
        let report = json!({
            "model": engine.config().name, "path": path, "machine": machine(), "device": arguments.device.to_string(),
            "threads": threads, "simd": level, "lambda": lambda, "recent": arguments.recent, "kv_type": kind.name(),
            "activations": activations,
            "bandwidth": bandwidth, "prefill": prefill, "decode": decode,
        });
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(
        out,
        "{} on {threads} threads of {} ({level}), {activations} activations, λ = {lambda}, {} cache, median of {} (least \
         to most)",
        engine.config().name.as_deref().unwrap_or("model"),
        machine().as_deref().unwrap_or(std::env::consts::ARCH),
        kind.name(),
        arguments.repetitions,
    )?;
    let speed = |speed: Spread| format!("{:8.1} tok/s ({:.1} to {:.1})", speed.median, speed.least, speed.most);
    for PrefillRow { tokens, speed: row } in prefill {
        writeln!(out, "  prefill {tokens:5}       {}", speed(row))?;
    }
    for DecodeRow { depth, speed: row, bytes } in decode {
        let share = 100.0 * row.median * bytes as f64 / bandwidth;
        writeln!(
            out,
            "  decode at {depth:5}     {}, {:.1} MB a token, {share:.0}% of the bandwidth",
            speed(row),
            bytes as f64 / 1e6
        )?;
    }
    writeln!(out, "  memory reads at {:.1} GB/s", bandwidth / 1e9)?;
    Ok(())
}

/// What the processor calls itself.
fn machine() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
