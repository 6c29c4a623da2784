//! `thinkey bench`: how fast a model runs on this machine.

use super::{
    CliError,
    budget::share,
    inspect::lambda,
    memory::peak_bytes,
    options::{ProcessorOptions, kv_type, stored},
    progress,
    pull::pull,
};
use serde::Serialize;
use serde_json::json;
use std::io::Write;
use thinkey::{
    bench::{self, BenchOptions, BenchStep, DecodeRow, PrefillRow, Spread},
    engine::{self, Device, Engine},
    machine::Machine,
    model::{
        Profile,
        transformer::{RECENT, WINDOW},
    },
    policy::{CacheDesign, Calibration},
    store::{self, DEFAULT},
    weights::Checkpoint,
};
use thinkey_core::{Lambda, Policy, policy::Store};
use thinkey_kernels::cpu::{bandwidth::read_bandwidth, pool::Pool};

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
    /// What the cache does, see `thinkey generate --help`; given several times, everything is measured with each
    #[arg(long, default_value = "think")]
    policy: Vec<Policy>,
    /// Shares of key channels to prune in place of the policy's, 0 ≤ λ < 1: everything is measured with each
    #[arg(long, value_delimiter = ',', value_parser = lambda)]
    lambda: Vec<Lambda>,
    /// Newest tokens kept whole
    #[arg(long, default_value_t = RECENT)]
    recent: usize,
    /// How keys and values are stored in place of the policy's: everything is measured with each
    #[arg(long, value_delimiter = ',', value_parser = kv_type())]
    kv_type: Vec<Store>,
    /// Where to compute
    #[arg(long, default_value_t = Device::Ndarray)]
    device: Device,
    #[command(flatten)]
    processor: ProcessorOptions,
    /// Show where the time goes; on CUDA, the time of asking for it
    #[arg(long)]
    profile: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// Every policy with every λ and every kind.
    fn policies(&self) -> Result<Vec<Policy>, CliError> {
        /// What is given, or nothing, once.
        fn each<T: Copy>(given: &[T]) -> Vec<Option<T>> {
            if given.is_empty() { vec![None] } else { given.iter().copied().map(Some).collect() }
        }
        let mut policies = Vec::new();
        for &policy in &self.policy {
            for lambda in each(&self.lambda) {
                let policy = lambda.map_or(Ok(policy), |lambda| policy.with_lambda(lambda))?;
                policies.extend(each(&self.kv_type).into_iter().map(|kind| stored(policy, kind)));
            }
        }
        Ok(policies)
    }
}

pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let path = pull(&store::Store::open()?, &arguments.model)?;
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
    let (needed, context) = (bench::tokens_needed(&options), engine.config().context);
    if needed > context {
        return Err(CliError::Depth { needed, context });
    }
    let calibration = Calibration::find(&checkpoint)?;

    let bar = progress::spinner();
    let mut series = Vec::new();
    for policy in arguments.policies()? {
        let design = CacheDesign::new(policy, engine.config(), calibration.as_ref())?;
        let mut tell = |step| {
            bar.tick();
            let what = match step {
                BenchStep::Prefill(tokens) => format!("prefill of {tokens} tokens"),
                BenchStep::Decode(depth) => format!("decode at depth {depth}"),
            };
            bar.set_message(format!("{policy}: {what}"));
        };
        let mut session = engine
            .session(design.options(1, needed, arguments.recent, WINDOW), |layer, head| design.kept(layer, head))?;
        series.push(Series {
            policy: policy.to_string(),
            lambda: policy.lambda().map(share),
            keys: policy.keys.name(),
            values: policy.values.name(),
            cache_bytes: session.planned().total(),
            prefill: bench::prefill(&mut engine, &mut session, &options, &mut tell)?,
            decode: bench::decode(&mut engine, &mut session, &checkpoint, &design, &options, &mut tell)?,
        });
    }
    // Before the bandwidth's buffer.
    let peak = peak_bytes();
    bar.set_message("memory bandwidth");
    let level = engine::level().map_err(thinkey::model::ModelError::from)?;
    let (memory, bandwidth) = bandwidth(arguments.device, threads)?;
    bar.finish_and_clear();

    let mut out = std::io::stdout().lock();
    if arguments.json {
        let report = json!({
            "model": engine.config().name, "path": path, "machine": machine(), "device": arguments.device.to_string(),
            "threads": threads, "simd": level.name(), "recent": arguments.recent, "activations": activations, "bandwidth": bandwidth,
            "process_bytes": peak, "series": series,
        });
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    let name = engine.config().name.as_deref().unwrap_or("model");
    let processor = machine().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let place = match arguments.device {
        Device::Ndarray => format!("{threads} threads of {processor} ({}), {activations} activations", level.name()),
        device => format!("{device} beside {processor}"),
    };
    writeln!(out, "{name} on {place}, median of {} (least to most)", arguments.repetitions)?;
    for series in &series {
        series.write(&mut out, bandwidth, arguments.profile)?;
    }
    writeln!(out, "{memory} at {:.1} GB/s", bandwidth / 1e9)?;
    Ok(())
}

/// What `device`'s memory does, and how many bytes of it a second.
fn bandwidth(device: Device, threads: usize) -> Result<(&'static str, f64), CliError> {
    #[cfg(feature = "cuda")]
    if device == Device::Cuda {
        return Ok(("the device's memory copies", thinkey_kernels::cuda::copy_bandwidth()));
    }
    let _ = device;
    let pool = Pool::new(threads).map_err(thinkey::model::ModelError::from)?;
    let level = engine::level().map_err(thinkey::model::ModelError::from)?;
    Ok(("memory reads", read_bandwidth(&pool, level, BUFFER, 5)))
}

/// What was measured with one kind of cache.
#[derive(Serialize)]
struct Series {
    policy: String,
    lambda: Option<f64>,
    keys: &'static str,
    values: &'static str,
    cache_bytes: usize,
    prefill: Vec<PrefillRow>,
    decode: Vec<DecodeRow>,
}

impl Series {
    fn write(&self, out: &mut impl Write, bandwidth: f64, profile: bool) -> std::io::Result<()> {
        let speed = |speed: Spread| format!("{:8.1} tok/s ({:.1} to {:.1})", speed.median, speed.least, speed.most);
        let parts = |out: &mut dyn Write, parts: &Profile| {
            let total = parts.total();
            let shares: Vec<_> =
                parts.parts().map(|(name, seconds)| format!("{name} {:.1}%", 100.0 * seconds / total)).into();
            if profile { writeln!(out, "      {}", shares.join(", ")) } else { Ok(()) }
        };
        writeln!(out, "{}", self.policy)?;
        for PrefillRow { tokens, speed: row, profile } in &self.prefill {
            writeln!(out, "  prefill {tokens:5}       {}", speed(*row))?;
            parts(out, profile)?;
        }
        for DecodeRow { depth, speed: row, bytes, profile } in &self.decode {
            let share = 100.0 * row.median * *bytes as f64 / bandwidth;
            writeln!(
                out,
                "  decode at {depth:5}     {}, {:.1} MB a token, {share:.0}% of the bandwidth",
                speed(*row),
                *bytes as f64 / 1e6
            )?;
            parts(out, profile)?;
        }
        Ok(())
    }
}

/// What the processor or the board calls itself.
fn machine() -> Option<String> {
    let machine = Machine::read();
    machine.processor.or(machine.board)
}
