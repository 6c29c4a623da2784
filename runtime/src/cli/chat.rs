//! `thinkey chat`: a conversation on one cache, to which each turn is appended.

use super::{
    CliError,
    answer::answer,
    budget::Budget,
    input::{Input, Line},
    interrupt,
    options::Options,
    stats::Stats,
};
use std::{
    io::{self, Write},
    process::ExitCode,
};
use thinkey::{
    engine::{Engine, Session},
    generate::{End, Reply, Request},
    model::ModelError,
    sample::Sampler,
    text::{ChatTemplate, Continuation, Message, Tokenizer},
};

/// Tokens planned for where `--context` does not say: the model's context, but not more memory than a small board has.
const CONTEXT: usize = 8192;

const HELP: &str = "\
/help   these lines
/stats  speed and cache bytes of the last answer
/reset  forget the conversation
/quit   end the chat, as Ctrl-D does
Ctrl-C ends an answer. A line that begins with a space is never a command.";

/// Arguments of `thinkey chat`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Instructions that frame the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Print speed and cache bytes after every answer
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    options: Options,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode, CliError> {
    let mut chat = Chat::open(arguments)?;
    let mut input = Input::open()?;
    interrupt::take_over()?;
    if let Input::Terminal(_) = input {
        println!("{}, {} tokens of context; /help lists the commands", chat.name, chat.session.plan().tokens);
    }
    let mut warned = false;
    loop {
        let line = match input.line("> ")? {
            Line::End => return Ok(ExitCode::SUCCESS),
            Line::Interrupt if warned => return Ok(interrupt::code()),
            Line::Interrupt => {
                eprintln!("(Ctrl-C again, Ctrl-D or /quit ends the chat)");
                warned = true;
                continue;
            }
            Line::Text(line) => line,
        };
        warned = false;
        match line.trim_end() {
            "" => {}
            "/help" => writeln!(io::stdout(), "{HELP}")?,
            "/stats" => chat.print_stats()?,
            "/reset" => chat.reset()?,
            "/quit" => return Ok(ExitCode::SUCCESS),
            command if command.starts_with('/') => {
                eprintln!("thinkey: there is no {command}; /help lists the commands")
            }
            _ => {
                chat.turn(line.trim())?;
                if arguments.stats && chat.last.is_some() {
                    chat.print_stats()?;
                }
            }
        }
    }
}

/// A conversation under way.
///
/// `tokens[..session.position(0)]` is in the cache; that is the text of `history`, rendered up to the end of its last
/// message without the stop token, or nothing.
struct Chat<'a> {
    options: &'a Options,
    system: Option<&'a str>,
    name: String,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    budget: Budget,
    engine: Engine,
    session: Session,
    sampler: Sampler,
    history: Vec<Message>,
    tokens: Vec<u32>,
    /// The last answer.
    last: Option<Reply>,
}

impl<'a> Chat<'a> {
    fn open(arguments: &'a Arguments) -> Result<Self, CliError> {
        let options = &arguments.options;
        let sampler = options.sampling.sampler()?;
        let (checkpoint, tokenizer) = options.model.open()?;
        let template = options.model.template(&tokenizer)?;
        let config = checkpoint.config();
        let planned = options.cache.context(config.context)?.unwrap_or(config.context.min(CONTEXT));
        let name = config.name.clone().unwrap_or_else(|| config.architecture.to_string());
        // A conversation that is read anew may be as long as the context.
        let budget = Budget::plan(options, &checkpoint, planned, planned)?;
        let engine = options.model.load(&checkpoint)?;
        let session = options.cache.session(&engine, planned, &budget.design)?;
        let mut chat = Self {
            options,
            system: arguments.system.as_deref(),
            name,
            tokenizer,
            template,
            budget,
            engine,
            session,
            sampler,
            history: Vec::new(),
            tokens: Vec::new(),
            last: None,
        };
        chat.reset()?;
        Ok(chat)
    }

    /// Forgets everything but the system message; the same questions get the same answers again.
    fn reset(&mut self) -> Result<(), CliError> {
        self.forget();
        self.history = self.system.map(Message::system).into_iter().collect();
        self.sampler = self.options.sampling.sampler()?;
        self.last = None;
        Ok(())
    }

    /// Empties the cache; the conversation is read again with the next question.
    fn forget(&mut self) {
        self.session.clear(0);
        self.tokens.clear();
    }

    /// Asks `question` and prints the answer. Where there is none (the context is full, or Ctrl-C came while the
    /// question was read) the conversation is as if the question had not been asked.
    fn turn(&mut self, question: &str) -> Result<(), CliError> {
        let question = Message::user(question);
        let (keep, new) = self.encode(&question)?;
        let (needed, planned) = (keep + new.len(), self.session.plan().tokens);
        if needed > planned {
            eprintln!(
                "thinkey: the context is full: of {planned} tokens {keep} are taken and this question needs {}; /reset \
                 starts anew",
                new.len()
            );
            return Ok(());
        }
        if keep == 0 {
            self.forget();
        }
        self.tokens.extend(new);
        let request = Request {
            slot: 0,
            tokens: &mut self.tokens,
            sampler: &mut self.sampler,
            tokenizer: &self.tokenizer,
            max_tokens: self.options.sampling.max_tokens,
            continues: false,
        };
        let mut out = io::stdout().lock();
        let reply = match answer(&mut self.engine, &mut self.session, request, &mut out) {
            Err(CliError::Model(ModelError::Interrupted)) => {
                self.forget();
                eprintln!("thinkey: interrupted; the question is forgotten");
                return Ok(());
            }
            reply => reply?,
        };
        writeln!(out)?;
        match reply.end {
            End::Stop => {}
            End::Interrupted => eprintln!("thinkey: interrupted"),
            End::MaxTokens => eprintln!("thinkey: cut off after {} tokens (--max-tokens)", reply.new_tokens),
            End::ContextFull => {
                eprintln!("thinkey: cut off: the context of {planned} tokens is full; /reset starts anew");
            }
        }
        self.history.extend([question, Message::assistant(reply.text.as_str())]);
        self.last = Some(reply);
        Ok(())
    }

    /// The tokens to go on with so that the model answers `question`, and how many of those there are stay.
    fn encode(&self, question: &Message) -> Result<(usize, Vec<u32>), CliError> {
        if self.tokens.is_empty() {
            let whole: Vec<Message> = self.history.iter().chain([question]).cloned().collect();
            return Ok((0, self.tokenizer.encode(&self.template.render(&whole, true)?, false)?));
        }
        Ok(match self.template.continuation(&self.history, question)? {
            Continuation::Append(text) => {
                (self.tokens.len(), self.tokenizer.encode_continuation(&text, self.tokens.last().copied())?)
            }
            Continuation::Restart(text) => (0, self.tokenizer.encode(&text, false)?),
        })
    }

    fn print_stats(&self) -> Result<(), CliError> {
        match &self.last {
            Some(reply) => writeln!(io::stdout(), "{}", Stats::new(reply, &self.session, &self.budget))?,
            None => {
                writeln!(io::stdout(), "no answer yet; the cache is planned for {} tokens", self.session.plan().tokens)?
            }
        }
        Ok(())
    }
}
