//! From one turn of a conversation to the next, on a cache that holds what was said.

use super::{ChatTemplate, Message, Role, TextError};

/// What to feed for the next turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Continuation {
    /// The cache stands. Feed this after what it holds: it goes on right after the reply's words, and so begins with the
    /// text of the stop token (where the template writes one). Encode it with
    /// [`Tokenizer::encode_continuation`](super::Tokenizer::encode_continuation), which leaves the stop token out if it
    /// was fed already.
    Append(String),
    /// The template rewrites what the cache holds (Qwen 3 removes the thinking from earlier replies, for example), so it
    /// cannot be used. Clear it and feed this, the whole conversation, encoded with
    /// [`Tokenizer::encode`](super::Tokenizer::encode).
    Restart(String),
}

impl ChatTemplate {
    /// What to feed so that the model replies to `new`, when the cache holds the conversation `history`.
    ///
    /// The last message of `history` is the model's reply. The cache must hold the text of
    /// `render(&history[..history.len() - 1], true)` followed by the reply as generated, with or without its stop token.
    /// [`Continuation::Append`] extends exactly that; the reply is not encoded again, so the cache keeps the tokens that
    /// the model chose. White space around the reply may differ (templates trim it); anything else that differs gives
    /// [`Continuation::Restart`], and so does a `history` that does not end with a reply.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn continuation(&self, history: &[Message], new: &Message) -> Result<Continuation, TextError> {
        let whole = self.render_all(history.iter().chain([new]), true)?;
        let Some((reply, before)) = history.split_last().filter(|(reply, _)| reply.role == Role::Assistant) else {
            return Ok(Continuation::Restart(whole));
        };
        let prompt = self.render(before, true)?;
        Ok(match after_reply(&whole, &prompt, &self.inert(&reply.content)) {
            Some(rest) => Continuation::Append(rest.to_owned()),
            None => Continuation::Restart(whole),
        })
    }
}

/// What follows in `whole` after `prompt` and `reply`.
fn after_reply<'a>(whole: &'a str, prompt: &str, reply: &str) -> Option<&'a str> {
    let rest = whole.strip_prefix(prompt)?;
    rest.strip_prefix(reply).or_else(|| rest.trim_start().strip_prefix(reply.trim()))
}
