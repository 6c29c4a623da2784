//! `thinkey-firmware-host talk`: a prompt to a device, and its answer.

use super::{CliError, run::BAUD};
use serde_json::{Value, json};
use std::{
    collections::hash_map::RandomState,
    fs,
    hash::BuildHasher,
    io::{self, Read, Write},
    net::TcpStream,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::{Duration, Instant},
};
use thinkey_core::{
    Policy,
    link::{
        Client,
        client::Event,
        message::{End, Ending, Form, Sampling, Snapshot, Start, Stats, ToHost},
        reliable::Timing,
    },
    wire,
};
use thinkey_firmware_host::{
    port::{Input, Port},
    serve::{Clock, TICK},
};

/// Options of `talk`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    line: Line,
    /// The question or instruction; with none and no --file, standard input is read
    prompt: Option<String>,
    /// A text that is put before the prompt
    #[arg(long)]
    file: Option<PathBuf>,
    /// Continue the prompt as it is, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Go on with what the device's cache holds, raw; with an empty prompt, the text just goes on
    #[arg(long)]
    append: bool,
    /// What the cache does [default: the device's]
    #[arg(long, value_name = "POLICY")]
    policy: Option<Policy>,
    /// Print cache bytes and speed after the answer
    #[arg(long)]
    stats: bool,
    /// Print answer and statistics as JSON
    #[arg(long)]
    json: bool,
    /// Write a snapshot of the device's cache to this file after the answer
    #[arg(long, value_name = "SNAPSHOT")]
    save: Option<PathBuf>,
    /// Restore a snapshot first
    #[arg(long, value_name = "SNAPSHOT")]
    restore: Option<PathBuf>,
    /// Ask nothing but how the device is, this many times, and print how long it takes
    #[arg(long, value_name = "TIMES")]
    ping: Option<usize>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 256)]
    max_tokens: u32,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Choose from the K likeliest tokens; 0 is off
    #[arg(long, default_value_t = 0)]
    top_k: u32,
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

/// Where the device is.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Line {
    /// The TCP address that a device listens on
    #[arg(long, value_name = "ADDRESS")]
    connect: Option<String>,
    /// A serial device, or the path of a pseudo-terminal
    #[arg(long, value_name = "PATH")]
    port: Option<PathBuf>,
}

impl Line {
    fn name(&self) -> String {
        match (&self.connect, &self.port) {
            (Some(address), _) => address.clone(),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => String::new(),
        }
    }

    fn open(&self) -> io::Result<Port> {
        match (&self.connect, &self.port) {
            (Some(address), _) => Port::tcp(TcpStream::connect(address)?),
            (None, Some(path)) => Port::terminal(path, Some(BAUD)),
            (None, None) => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// How long a device may be silent at first.
const PATIENCE: Duration = Duration::from_secs(10);

static PRESSED: AtomicBool = AtomicBool::new(false);

/// A client, its line, and what it has heard.
struct Talk {
    client: Client,
    port: Port,
    clock: Clock,
    heard: Heard,
}

/// What a device has said and nobody has looked at yet.
#[derive(Default)]
struct Heard {
    connected: bool,
    accepted: bool,
    text: Vec<u8>,
    ending: Option<Ending>,
    stats: Option<Stats>,
    healthy: bool,
    snapshot: Option<Snapshot>,
    chunks: Vec<u8>,
    restored: Option<u32>,
    error: Option<CliError>,
}

impl Heard {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Connected(_) => self.connected = true,
            Event::Restarted => self.error = Some(CliError::Restarted),
            Event::Version { device } => self.error = Some(CliError::Version { device }),
            Event::Message(message) => match message {
                ToHost::Accepted { .. } => self.accepted = true,
                ToHost::Failed { code, detail, .. } => {
                    self.error = Some(CliError::Failed { code, detail: detail.to_owned() });
                }
                ToHost::Token { text, .. } | ToHost::Text { text, .. } => self.text.extend_from_slice(text),
                ToHost::Ended { ending, .. } => self.ending = Some(ending),
                ToHost::Stats(stats) => self.stats = Some(stats),
                ToHost::Health(_) => self.healthy = true,
                ToHost::Snapshot(snapshot) => self.snapshot = Some(snapshot),
                ToHost::Chunk { bytes } => self.chunks.extend_from_slice(bytes),
                ToHost::Restored { tokens } => self.restored = Some(tokens),
                ToHost::Read { .. } | ToHost::Log { .. } => {}
            },
        }
    }
}

impl Talk {
    /// Says what is to be said, and waits for something to happen.
    fn turn(&mut self) -> Result<(), CliError> {
        let Self { client, port, clock, heard } = self;
        port.write(|out| client.transmit(clock.now(), out));
        let mut input = port.next(TICK);
        while let Some(next) = input {
            match next {
                Input::Bytes(bytes) => client.receive(clock.now(), &bytes, &mut |event| {
                    heard.take(event);
                    true
                }),
                Input::Work => {}
                Input::Closed => return Err(CliError::Closed),
            }
            input = port.try_next();
        }
        match heard.error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Turns until `found` finds something.
    fn until<T>(&mut self, mut found: impl FnMut(&mut Heard) -> Option<T>) -> Result<T, CliError> {
        loop {
            if let Some(found) = found(&mut self.heard) {
                return Ok(found);
            }
            self.turn()?;
        }
    }

    /// The answer to `prompt`, whose text goes to `out` as it comes.
    fn ask(&mut self, start: &Start<'_>, prompt: &[u8], out: &mut dyn Write) -> Result<(String, Ending), CliError> {
        let request = self.client.start(start)?;
        let (mut sent, mut cancelled, mut answer) = (0, false, Vec::new());
        loop {
            if self.heard.accepted && sent < prompt.len() {
                sent += self.client.prompt(request, &prompt[sent..]);
            }
            if !cancelled && PRESSED.load(SeqCst) {
                cancelled = self.client.cancel(request).is_ok();
            }
            if !self.heard.text.is_empty() {
                out.write_all(&self.heard.text)?;
                out.flush()?;
                answer.append(&mut self.heard.text);
            }
            if let Some(ending) = self.heard.ending.take() {
                self.heard.accepted = false;
                return Ok((String::from_utf8_lossy(&answer).into_owned(), ending));
            }
            self.turn()?;
        }
    }

    /// The snapshot of the device's cache.
    fn save(&mut self) -> Result<Vec<u8>, CliError> {
        self.client.save()?;
        let snapshot = self.until(|heard| heard.snapshot.take())?;
        let whole = |heard: &mut Heard| (heard.chunks.len() >= snapshot.bytes as usize).then_some(());
        self.until(whole)?;
        Ok(std::mem::take(&mut self.heard.chunks))
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<u32, CliError> {
        self.client.restore(Snapshot { bytes: bytes.len() as u32, checksum: wire::checksum(bytes) })?;
        let mut sent = 0;
        loop {
            sent += self.client.chunk(&bytes[sent..]);
            if let Some(tokens) = self.heard.restored.take() {
                return Ok(tokens);
            }
            self.turn()?;
        }
    }
}

/// Runs the command.
///
/// # Errors
/// A line or a device that does not answer, or refuses.
pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let line = arguments.line.name();
    let port = arguments.line.open().map_err(|cause| CliError::Line { line: line.clone(), cause })?;
    let client = Client::new(RandomState::new().hash_one(0) as u32, Timing::default());
    let mut talk = Talk { client, port, clock: Clock::default(), heard: Heard::default() };
    let begun = Instant::now();
    while !talk.heard.connected {
        if begun.elapsed() > PATIENCE {
            return Err(CliError::Silence { line, seconds: PATIENCE.as_secs() });
        }
        talk.turn()?;
    }
    if let Some(times) = arguments.ping {
        return ping(&mut talk, times);
    }
    if let Some(path) = &arguments.restore {
        let bytes = fs::read(path).map_err(|cause| CliError::Input { path: path.clone(), cause })?;
        let tokens = talk.restore(&bytes)?;
        eprintln!("restored {tokens} tokens");
    }

    let prompt = prompt(arguments)?;
    let policy = arguments.policy.map(|policy| policy.to_string()).unwrap_or_default();
    let form = if arguments.raw || arguments.append { Form::Raw } else { Form::Message };
    let start = Start {
        prompt_bytes: prompt.len() as u32,
        form,
        append: arguments.append,
        max_tokens: arguments.max_tokens,
        sampling: Sampling {
            temperature: arguments.temperature,
            top_k: arguments.top_k,
            top_p: arguments.top_p,
            min_p: arguments.min_p,
            repetition_penalty: arguments.repetition_penalty,
            seed: arguments.seed,
        },
        policy: &policy,
    };
    ctrlc::set_handler(|| PRESSED.store(true, SeqCst)).map_err(CliError::Interrupt)?;
    let mut out = io::stdout().lock();
    let (answer, ending) = if arguments.json {
        talk.ask(&start, prompt.as_bytes(), &mut io::sink())?
    } else {
        talk.ask(&start, prompt.as_bytes(), &mut out)?
    };
    if !arguments.json {
        writeln!(out)?;
    }
    if arguments.stats || arguments.json {
        talk.client.stats()?;
        let stats = talk.until(|heard| heard.stats.take())?;
        if arguments.json {
            serde_json::to_writer_pretty(&mut out, &report(&answer, &ending, &stats)).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            writeln!(out, "\n{}", lines(&ending, &stats))?;
        }
    }
    if let Some(path) = &arguments.save {
        let bytes = talk.save()?;
        fs::write(path, bytes)?;
    }
    // What was heard last is to be known before the line is closed.
    talk.until(|_| Some(()))?;
    if ending.end == End::Cancelled {
        eprintln!("thinkey-firmware-host: interrupted");
    }
    Ok(())
}

/// Measures round trips without work of the model.
fn ping(talk: &mut Talk, times: usize) -> Result<(), CliError> {
    let mut trips = Vec::new();
    for _ in 0..times.max(1) {
        let begun = Instant::now();
        talk.client.health()?;
        talk.until(|heard| std::mem::take(&mut heard.healthy).then_some(()))?;
        trips.push(begun.elapsed());
    }
    trips.sort_unstable();
    let at = |share: usize| trips[(trips.len() - 1) * share / 100].as_secs_f64() * 1e6;
    println!("{} round trips: median {:.0} µs, 99% {:.0} µs, least {:.0} µs", trips.len(), at(50), at(99), at(0));
    Ok(())
}

/// The text to answer: the file, then the prompt; standard input where neither is given.
fn prompt(arguments: &Arguments) -> Result<String, CliError> {
    let read = |path: &PathBuf| fs::read_to_string(path).map_err(|cause| CliError::Input { path: path.clone(), cause });
    Ok(match (&arguments.file, &arguments.prompt) {
        (None, None) => {
            let mut text = String::new();
            let input = |cause| CliError::Input { path: PathBuf::from("-"), cause };
            io::stdin().read_to_string(&mut text).map_err(input)?;
            text
        }
        (None, Some(prompt)) => prompt.clone(),
        (Some(file), None) => read(file)?,
        (Some(file), Some(prompt)) => format!("{}\n\n{prompt}", read(file)?),
    })
}

fn end(end: End) -> &'static str {
    match end {
        End::Stop => "stop",
        End::MaxTokens => "max_tokens",
        End::ContextFull => "context_full",
        End::Cancelled => "cancelled",
    }
}

fn report(answer: &str, ending: &Ending, stats: &Stats) -> Value {
    json!({
        "answer": answer,
        "end": end(ending.end),
        "tokens": { "prompt": ending.prompt_tokens, "new": ending.new_tokens },
        "seconds": { "prefill": ending.prefill_us as f64 / 1e6, "decode": ending.decode_us as f64 / 1e6 },
        "cache": {
            "tokens": stats.context, "used": stats.tokens, "flushes": stats.flushes,
            "lambda": stats.lambda.map(|lambda| f64::from(lambda) / 1000.0),
        },
        "cache_bytes": {
            "whole": stats.whole_bytes, "total": stats.bytes.total(), "parts": stats.bytes,
        },
    })
}

fn lines(ending: &Ending, stats: &Stats) -> String {
    let seconds = |us: u64| us as f64 / 1e6;
    format!(
        "{} prompt tokens in {:.3} s, {} new in {:.3} s\ncache for {} tokens, {} used, {} blocks thinned: whole {} bytes, \
         planned {}",
        ending.prompt_tokens,
        seconds(ending.prefill_us),
        ending.new_tokens,
        seconds(ending.decode_us),
        stats.context,
        stats.tokens,
        stats.flushes,
        stats.whole_bytes,
        stats.bytes.total(),
    )
}
