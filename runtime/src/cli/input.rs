//! Lines from the person: edited on a terminal, as they are from a pipe.

use super::CliError;
use rustyline::{Config, Editor, config::Configurer, error::ReadlineError, history::MemHistory};
use std::io::{self, IsTerminal};

/// Where lines come from.
pub enum Input {
    /// A terminal, with a line editor.
    Terminal(Box<Editor<(), MemHistory>>),
    /// A pipe or a file.
    Pipe,
}

/// What the person did.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// Entered a line, given without its end.
    Text(String),
    /// Pressed Ctrl-C.
    Interrupt,
    /// Ended the input.
    End,
}

impl Input {
    /// Standard input.
    ///
    /// # Errors
    /// [`CliError::Terminal`] where the terminal cannot be set up.
    pub fn open() -> Result<Self, CliError> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe);
        }
        let mut editor = Editor::with_history(Config::default(), MemHistory::new()).map_err(CliError::Terminal)?;
        editor.set_auto_add_history(true);
        Ok(Self::Terminal(Box::new(editor)))
    }

    /// The next line; a terminal shows `prompt` before it.
    ///
    /// # Errors
    /// [`CliError::Terminal`], [`CliError::Input`] where it cannot be read, also where it is not UTF-8.
    pub fn line(&mut self, prompt: &str) -> Result<Line, CliError> {
        match self {
            Self::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupt),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(CliError::Terminal(error)),
            },
            Self::Pipe => {
                let mut line = String::new();
                if io::stdin().read_line(&mut line).map_err(CliError::Input)? == 0 {
                    return Ok(Line::End);
                }
                let text = line.strip_suffix('\n').unwrap_or(&line);
                Ok(Line::Text(text.strip_suffix('\r').unwrap_or(text).to_owned()))
            }
        }
    }
}
