//! `thinkey-firmware-host talk`: a prompt to a device, and its answer.

use super::{
    CliError,
    host::{Host, Line},
    log::{Printer, decoder},
};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::{
    fs,
    io::{self, Read, Write},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Instant,
};
use thinkey_core::{
    Policy,
    link::{
        client::Event,
        message::{End, Ending, Form, Health, Sampling, Snapshot, Start, Stats, ToHost},
    },
    wire,
};
use thinkey_firmware_host::log::Level;

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
    /// Write a snapshot of the device's cache to this file after the answer; without a prompt, nothing is asked
    #[arg(long, value_name = "SNAPSHOT")]
    save: Option<PathBuf>,
    /// Restore a snapshot first, to go on with --append; without a prompt, nothing is asked
    #[arg(long, value_name = "SNAPSHOT")]
    restore: Option<PathBuf>,
    /// Print what the device logs on the standard error; this is the ELF file of its firmware
    #[arg(long, value_name = "ELF")]
    log: Option<PathBuf>,
    /// Leave out log records below this level
    #[arg(long, value_enum, default_value_t = Level::Trace)]
    level: Level,
    /// Ask nothing but how the device is, and print it
    #[arg(long)]
    health: bool,
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

impl Arguments {
    /// Whether an answer is asked for, and not only a snapshot moved.
    const fn asks(&self) -> bool {
        self.prompt.is_some() || self.file.is_some() || (self.save.is_none() && self.restore.is_none())
    }
}

static PRESSED: AtomicBool = AtomicBool::new(false);

/// A host, and what it has heard.
struct Talk<'l> {
    host: Host,
    heard: Heard<'l>,
}

/// What a device has said and nobody has looked at yet.
#[derive(Default)]
struct Heard<'l> {
    /// Prints the device's log, where it is asked for.
    log: Option<Printer<'l>>,
    accepted: bool,
    /// How far the prompt is read: parts done, of how many.
    read: Option<(u16, u16)>,
    text: Vec<u8>,
    ending: Option<Ending>,
    stats: Option<Stats>,
    health: Option<Health>,
    snapshot: Option<Snapshot>,
    chunks: Vec<u8>,
    restored: Option<u32>,
    error: Option<CliError>,
}

impl Heard<'_> {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Connected(_) => {}
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
                ToHost::Health(health) => self.health = Some(health),
                ToHost::Snapshot(snapshot) => self.snapshot = Some(snapshot),
                ToHost::Chunk { bytes } => self.chunks.extend_from_slice(bytes),
                ToHost::Restored { tokens } => self.restored = Some(tokens),
                ToHost::Log { bytes } => {
                    if let Some(Err(error)) = self.log.as_mut().map(|log| log.print(bytes, &mut io::stderr())) {
                        self.error = Some(error);
                    }
                }
                ToHost::Read { done, of, .. } => self.read = Some((done, of)),
            },
        }
    }
}

impl<'l> Talk<'l> {
    /// A turn of the host.
    fn turn(&mut self) -> Result<(), CliError> {
        let Self { host, heard } = self;
        host.turn(&mut |event| heard.take(event))?;
        match heard.error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Turns until `found` finds something.
    fn until<T>(&mut self, mut found: impl FnMut(&mut Heard<'l>) -> Option<T>) -> Result<T, CliError> {
        loop {
            if let Some(found) = found(&mut self.heard) {
                return Ok(found);
            }
            self.turn()?;
        }
    }

    /// The answer to `prompt`, whose text goes to `out` as it comes.
    fn ask(&mut self, start: &Start<'_>, prompt: &[u8], out: &mut dyn Write) -> Result<(String, Ending), CliError> {
        let request = self.host.client.start(start)?;
        let (mut sent, mut cancelled, mut answer) = (0, false, Vec::new());
        // Drawn on a terminal's standard error alone, until the first token.
        let style = ProgressStyle::with_template("reading {wide_bar} {pos}/{len}");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        loop {
            if let Some((done, of)) = self.heard.read.take() {
                bar.set_length(of.into());
                bar.set_position(done.into());
            }
            if self.heard.accepted && sent < prompt.len() {
                sent += self.host.client.prompt(request, &prompt[sent..]);
            }
            if !cancelled && PRESSED.load(SeqCst) {
                cancelled = self.host.client.cancel(request).is_ok();
            }
            if !self.heard.text.is_empty() {
                bar.finish_and_clear();
                out.write_all(&self.heard.text)?;
                out.flush()?;
                answer.append(&mut self.heard.text);
            }
            if let Some(ending) = self.heard.ending.take() {
                bar.finish_and_clear();
                self.heard.accepted = false;
                return Ok((String::from_utf8_lossy(&answer).into_owned(), ending));
            }
            self.turn()?;
        }
    }

    /// The snapshot of the device's cache.
    fn save(&mut self) -> Result<Vec<u8>, CliError> {
        self.host.client.save()?;
        let snapshot = self.until(|heard| heard.snapshot.take())?;
        let bar = bar("saving", snapshot.bytes);
        self.until(|heard| {
            bar.set_position(heard.chunks.len() as u64);
            (heard.chunks.len() >= snapshot.bytes as usize).then_some(())
        })?;
        bar.finish_and_clear();
        let bytes = std::mem::take(&mut self.heard.chunks);
        if bytes.len() != snapshot.bytes as usize || wire::checksum(&bytes) != snapshot.checksum {
            return Err(CliError::Snapshot);
        }
        Ok(bytes)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<u32, CliError> {
        self.host.client.restore(Snapshot { bytes: bytes.len() as u32, checksum: wire::checksum(bytes) })?;
        let (bar, mut sent) = (bar("restoring", bytes.len() as u32), 0);
        loop {
            sent += self.host.client.chunk(&bytes[sent..]);
            bar.set_position(sent as u64);
            if let Some(tokens) = self.heard.restored.take() {
                bar.finish_and_clear();
                return Ok(tokens);
            }
            self.turn()?;
        }
    }
}

/// Shows how many bytes of a snapshot have gone over the line, as that may be a slow one.
fn bar(what: &'static str, bytes: u32) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bytes}/{total_bytes} {wide_bar} {eta}");
    ProgressBar::new(bytes.into()).with_message(what).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Runs the command.
///
/// # Errors
/// A line or a device that does not answer, or refuses.
pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    let decoder = arguments.log.as_deref().map(decoder).transpose()?;
    let log = decoder.as_ref().map(|decoder| Printer::new(decoder, arguments.level, false));
    let mut heard = Heard { log, ..Heard::default() };
    let host = Host::connect(&arguments.line, &mut |event| heard.take(event))?;
    let mut talk = Talk { host, heard };
    if let Some(times) = arguments.ping {
        return ping(&mut talk, times);
    }
    if arguments.health {
        talk.host.client.health()?;
        println!("{}", healthy(&talk.until(|heard| heard.health.take())?));
        return Ok(());
    }
    if let Some(path) = &arguments.restore {
        let bytes = fs::read(path).map_err(|cause| CliError::Input { path: path.clone(), cause })?;
        let tokens = talk.restore(&bytes)?;
        eprintln!("restored {tokens} tokens");
    }

    if arguments.asks() {
        ask(arguments, &mut talk)?;
    }
    if let Some(path) = &arguments.save {
        let bytes = talk.save()?;
        fs::write(path, bytes).map_err(|cause| CliError::Write { path: path.clone(), cause })?;
    }
    if let (Some(printer), Some(elf)) = (&talk.heard.log, &arguments.log) {
        printer.finish(elf);
    }
    Ok(())
}

/// Asks for an answer and prints it.
fn ask(arguments: &Arguments, talk: &mut Talk<'_>) -> Result<(), CliError> {
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
        talk.host.client.stats()?;
        let stats = talk.until(|heard| heard.stats.take())?;
        if arguments.json {
            serde_json::to_writer_pretty(&mut out, &report(&answer, &ending, &stats)).map_err(io::Error::from)?;
            writeln!(out)?;
        } else {
            writeln!(out, "\n{}", lines(&ending, &stats))?;
        }
    }
    if ending.end == End::Cancelled {
        eprintln!("thinkey-firmware-host: interrupted");
    }
    Ok(())
}

/// Measures round trips without work of the model.
fn ping(talk: &mut Talk<'_>, times: usize) -> Result<(), CliError> {
    let mut trips = Vec::new();
    for _ in 0..times.max(1) {
        let begun = Instant::now();
        talk.host.client.health()?;
        talk.until(|heard| heard.health.take())?;
        trips.push(begun.elapsed());
    }
    trips.sort_unstable();
    let at = |share: usize| trips[(trips.len() - 1) * share / 100].as_secs_f64() * 1e6;
    println!("{} round trips: median {:.0} µs, 99% {:.0} µs, least {:.0} µs", trips.len(), at(50), at(99), at(0));
    Ok(())
}

/// How the device is, in a line for people.
fn healthy(health: &Health) -> String {
    let Health { uptime_ms, free_bytes, requests, waiting, busy, damaged, resent, lost_log } = *health;
    let free = free_bytes.map_or_else(String::new, |bytes| format!("{} free; ", HumanBytes(bytes)));
    format!(
        "{}, up for {:.1} s; {free}{requests} requests ended, {waiting} waiting; {damaged} frames came damaged, {resent} were \
         sent again; {lost_log} bytes of log lost",
        if busy { "busy" } else { "idle" },
        uptime_ms as f64 / 1e3,
    )
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
    // By the names that JSON has.
    let parts = match json!(stats.bytes) {
        Value::Object(parts) => parts.into_iter().filter(|(_, bytes)| *bytes != 0).collect(),
        _ => Vec::new(),
    };
    let parts: Vec<String> = parts.iter().map(|(name, bytes)| format!("{} {bytes}", name.replace('_', " "))).collect();
    let lambda = stats.lambda.map_or_else(String::new, |lambda| format!(", λ = {}", f64::from(lambda) / 1000.0));
    format!(
        "{} prompt tokens in {:.3} s, {} new in {:.3} s\ncache for {} tokens, {} used, {} blocks thinned{lambda}: whole {} bytes, \
         planned {} ({})",
        ending.prompt_tokens,
        seconds(ending.prefill_us),
        ending.new_tokens,
        seconds(ending.decode_us),
        stats.context,
        stats.tokens,
        stats.flushes,
        stats.whole_bytes,
        stats.bytes.total(),
        parts.join(", "),
    )
}
