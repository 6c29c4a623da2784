//! What can be wrong with a tokenizer, a template or a text.

use std::{fmt::Display, io, path::PathBuf};

/// Why a tokenizer could not be built, or a text not encoded or rendered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// The tokenizer lists no tokens.
    #[error("the tokenizer has no tokens; convert the model again, with its vocabulary")]
    NoTokens,

    /// A part without which texts cannot be encoded is missing.
    #[error("the tokenizer has no {0}; convert the model again, with its vocabulary")]
    Missing(&'static str),

    /// A kind of tokenizer that is not built here.
    #[error("{what} {found:?} is not supported; supported: {supported}")]
    Unsupported {
        /// What is of an unknown kind (`pre-tokenizer`).
        what: &'static str,
        /// The kind the model names.
        found: String,
        /// The kinds that are known, separated by commas.
        supported: &'static str,
    },

    /// A list with one entry a token has another length than the list of tokens.
    #[error("the tokenizer has {tokens} tokens but {found} {what}; it needs one for each token")]
    Length {
        /// What is listed (`scores`).
        what: &'static str,
        /// Number of entries.
        found: usize,
        /// Number of tokens.
        tokens: usize,
    },

    /// The number of a token that does not exist.
    #[error("the {what} token is {id}, but the tokenizer has only {tokens} tokens")]
    IdOutOfRange {
        /// What the token is for (`bos`), or its text.
        what: String,
        /// Its number.
        id: u32,
        /// Number of tokens.
        tokens: usize,
    },

    /// Two tokens where one is expected, or a token that cannot be what its kind says.
    #[error("token {id} ({text:?}) {reason}")]
    Token {
        /// Number of the token.
        id: u32,
        /// Its text.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// A merge that names a token the vocabulary lacks, or no two tokens at all.
    #[error("merge {index} ({merge:?}) {reason}")]
    Merge {
        /// Place in the list of merges, from 0.
        index: usize,
        /// The merge as written.
        merge: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A byte that ordinary text is made of has no token.
    #[error("the tokenizer has no token for byte {0:#04x}, so it cannot encode every text")]
    NoByteToken(u8),

    /// A file could not be read.
    #[error("cannot read {path}: {cause}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        cause: io::Error,
    },

    /// A file is not what its name says.
    #[error("{path} is damaged or of an unknown form: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        reason: String,
    },

    /// A text could not be split into tokens.
    #[error("cannot encode the text: {0}")]
    Encode(String),

    /// The model comes without a chat template.
    #[error(
        "the model has no chat template; give one (--chat-template) or let it continue the text as it is (generate --raw)"
    )]
    NoTemplate,

    /// A chat template is malformed, or fails on this conversation.
    #[error("line {line} of the chat template: {reason}")]
    Template {
        /// Line in the template, from 1 (0 where the place is not known).
        line: usize,
        /// What is wrong.
        reason: String,
    },

    /// The template itself raises an exception about the conversation (roles that do not alternate, say).
    #[error("the chat template refuses the conversation: {0}")]
    Refused(String),
}

/// What another library says, on one line: it may quote a file.
pub(super) fn one_line(message: impl Display) -> String {
    message.to_string().split(|c: char| c.is_whitespace() || c.is_control()).collect::<Vec<_>>().join(" ")
}
