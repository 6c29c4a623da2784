//! `thinkey-firmware-host run`: a device on this machine.

use super::CliError;
use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    io,
    net::TcpListener,
    num::NonZeroUsize,
    ops::ControlFlow,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};
use thinkey::{
    engine::{Device as Computes, EngineOptions},
    plan::Size,
    store::{DEFAULT, Store},
    weights::Checkpoint,
};
use thinkey_core::{
    Policy,
    link::{Device, reliable::Timing},
};
use thinkey_firmware_host::{
    engine::{LoadError, ModelEngine, Options},
    port::{Port, Pty, Wake},
    serve::{Clock, serve},
};

/// Options of `run`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A model in the store (pulled if it is missing) or a path
    #[arg(long, default_value = DEFAULT.id)]
    model: String,
    /// What the cache does where a request does not say [default: as `thinkey generate`]
    #[arg(long, value_name = "POLICY")]
    policy: Option<Policy>,
    /// Tokens of a sequence, prompt and answer [default: the model's context, at most 8192]
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Where the model is computed: ndarray (the processor) or, in a build with the feature `cuda`, cuda
    #[arg(long, default_value_t)]
    device: Computes,
    /// Threads on the processor [default: all cores]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Refuse models and policies that would take more memory, weights included, as 2GiB or 500MB; the program itself and a
    /// snapshot under way come on top
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<Size>,
    #[command(flatten)]
    line: Line,
    /// Speed of a serial device; both ends have the same
    #[arg(long, default_value_t = BAUD)]
    baud: u32,
}

/// Where the host is. Standard input and output where nothing is given.
#[derive(clap::Args)]
#[group(multiple = false)]
struct Line {
    /// Serve TCP connections to this address, one after the other; port 0 takes a free one, which is printed
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Serve a new pseudo-terminal, whose path is printed
    #[arg(long)]
    pty: bool,
    /// Serve a serial device, as /dev/ttyTHS1
    #[arg(long, value_name = "PATH")]
    serial: Option<PathBuf>,
    /// Serve standard input and output (the default)
    #[arg(long)]
    stdio: bool,
}

/// Speed of a serial device where nobody says: what [`Timing::default`] is made for.
pub const BAUD: u32 = 115_200;

/// What this program has logged in defmt frames, as far as it fits so many bytes: nothing, unless it is built with the feature
/// `defmt`.
fn logged(most: usize) -> Vec<u8> {
    #[cfg(feature = "defmt")]
    return thinkey_firmware_host::logger::take(most);
    #[cfg(not(feature = "defmt"))]
    {
        let _ = most;
        Vec::new()
    }
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be served, a line that cannot be opened.
pub fn run(arguments: &Arguments) -> Result<(), CliError> {
    // Whoever waits for the port that is served is woken.
    let waiting: Arc<Mutex<Option<Wake>>> = Arc::default();
    let woken = Arc::clone(&waiting);
    let wake = move || {
        if let Some(wake) = &*woken.lock().unwrap_or_else(PoisonError::into_inner) {
            wake.wake();
        }
    };
    let path = Store::open()?.pull(&arguments.model, &mut |_| ControlFlow::Continue(()))?;
    let checkpoint = Checkpoint::open(&path).map_err(LoadError::from)?;
    let mut engine = EngineOptions { device: arguments.device, ..EngineOptions::default() };
    if let Some(threads) = arguments.threads {
        engine.threads = threads.get();
    }
    let budget = arguments.max_memory.map_or(0, |Size(bytes)| bytes);
    let options = Options { engine, policy: arguments.policy, context: arguments.context, budget };
    let engine = ModelEngine::load(checkpoint, options, wake)?;
    #[cfg(feature = "defmt")]
    defmt::info!("serving {=str}", thinkey_core::link::Engine::capabilities(&engine).model);

    let clock = Clock::default();
    // Another number each time: hashers are seeded at random.
    let boot = RandomState::new().hash_one(0) as u32;
    let mut device = Device::new(engine, boot, Timing::default(), clock.now());
    let mut on = |mut port: Port| {
        *waiting.lock().unwrap_or_else(PoisonError::into_inner) = Some(port.waker());
        serve(&mut device, &mut port, clock, &mut logged);
    };
    let failed = |line: &str, cause| CliError::Line { line: line.to_owned(), cause };
    let Line { listen, pty, serial, .. } = &arguments.line;
    if let Some(address) = listen {
        let failed = |cause| failed(address, cause);
        let listener = TcpListener::bind(address).map_err(failed)?;
        println!("listening on {}", listener.local_addr().map_err(failed)?);
        for stream in listener.incoming() {
            // A connection that is gone already is nobody's.
            if let Ok(port) = stream.and_then(Port::tcp) {
                on(port);
            }
        }
    } else if *pty {
        let (pty, port) = Pty::open().map_err(|cause| failed("of a pseudo-terminal", cause))?;
        println!("serving {}", pty.path.display());
        on(port);
    } else if let Some(path) = serial {
        on(Port::terminal(path, Some(arguments.baud)).map_err(|cause| failed(&path.display().to_string(), cause))?);
    } else {
        on(Port::new(io::stdin(), io::stdout()));
    }
    Ok(())
}
