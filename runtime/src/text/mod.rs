//! Text in, token ids out, and back: tokenizers, chat templates and the way between two turns of a conversation.
//!
//! A [`Tokenizer`] is built from what comes with the weights (GGUF metadata or the files of a Hugging Face folder). It
//! encodes text and hands out a streaming [`Detokeniser`] and the model's [`ChatTemplate`].
//!
//! # Trusted and untrusted text
//!
//! Control tokens (`<|im_start|>`, `</s>`) steer the model, and they are written as text in rendered templates. So
//! [`Tokenizer::encode`] recognises them, and text from outside must not reach it as it is: use
//! [`Tokenizer::encode_plain`] for a text alone. In a conversation nothing needs to be done: a template from
//! [`Tokenizer::chat_template`] makes the contents of messages inert (see [`ControlTokens::escape`]) before they are
//! rendered.
//!
//! # A conversation on one cache
//!
//! ```no_run
//! # use thinkey::text::{Continuation, Message, Tokenizer};
//! # fn feed(ids: &[u32]) {}
//! # fn clear() {}
//! # fn generate() -> (String, Option<u32>) { Default::default() }
//! # fn chat(tokenizer: &Tokenizer) -> Result<(), thinkey::text::TextError> {
//! let template = tokenizer.chat_template()?;
//! let mut history = vec![Message::user("Name a river.")];
//! feed(&tokenizer.encode(&template.render(&history, true)?, false)?);
//! // The reply without its stop token, and the last token that was fed (the stop token, if the caller feeds it).
//! let (reply, last_fed) = generate();
//! history.push(Message::assistant(reply));
//!
//! let new = Message::user("And a lake?");
//! match template.continuation(&history, &new)? {
//!     Continuation::Append(text) => feed(&tokenizer.encode_continuation(&text, last_fed)?),
//!     Continuation::Restart(text) => {
//!         clear();
//!         feed(&tokenizer.encode(&text, false)?);
//!     }
//! }
//! history.push(new);
//! # Ok(())
//! # }
//! ```

mod control;
mod conversation;
mod detokenise;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod folder;
mod gguf;
mod model;
mod pieces;
mod pretokenise;
mod sentencepiece;
mod template;
mod template_source;
mod tokenizer;

pub use control::ControlTokens;
pub use conversation::Continuation;
pub use detokenise::Detokeniser;
pub use error::TextError;
pub use template::{ChatTemplate, Message, Role};
pub use template_source::TemplateSource;
pub use tokenizer::Tokenizer;
