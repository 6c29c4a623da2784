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

#[cfg(test)]
mod tests {
    use super::{
        super::{TextError, Tokenizer, fixture},
        *,
    };
    use crate::weights::TokenizerSource;

    const CHATML: &str = include_str!("../../../tests/fixtures/templates/smollm2.jinja");
    const HEADERS: &str = include_str!("../../../tests/fixtures/templates/headers.jinja");
    const INST: &str = include_str!("../../../tests/fixtures/templates/inst.jinja");
    const THINKING: &str = include_str!("../../../tests/fixtures/templates/thinking.jinja");

    fn next(source: &str, history: &[Message], new: &str) -> Continuation {
        ChatTemplate::new(source, "<s>", "</s>").unwrap().continuation(history, &Message::user(new)).unwrap()
    }

    fn append(text: &str) -> Continuation {
        Continuation::Append(text.to_owned())
    }

    #[test]
    fn a_turn_is_what_follows_the_reply() {
        let history = [Message::system("s"), Message::user("a"), Message::assistant("b")];
        let expected = "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(next(CHATML, &history, "c"), append(expected));
        assert_eq!(next(CHATML, &history[1..], "c"), append(expected));
        assert_eq!(next(INST, &history[1..], "c"), append("</s>[INST] c[/INST]"));
        assert_eq!(next(ChatTemplate::PLAIN, &history, "c"), append("\nuser: c\nassistant:"));
    }

    #[test]
    fn white_space_that_the_template_trims_is_forgiven() {
        let history = [Message::user("a"), Message::assistant("\n b c \n")];
        let expected = "<|eot|><|head|>user<|/head|>\n\nd<|eot|><|head|>assistant<|/head|>\n\n";
        assert_eq!(next(HEADERS, &history, "d"), append(expected));
    }

    #[test]
    fn a_rewritten_history_asks_for_a_restart() {
        let thought = Message::assistant("<think>\nhm\n</think>\n\nb");
        let restart = |next: Continuation| match next {
            Continuation::Restart(text) => text,
            Continuation::Append(text) => panic!("appends {text:?}"),
        };
        let text = restart(next(THINKING, &[Message::user("a"), thought], "c"));
        assert!(text.starts_with("<|im_start|>user\na") && !text.contains("hm"), "{text}");
        // The system message moves into the last question.
        restart(next(INST, &[Message::system("s"), Message::user("a"), Message::assistant("b")], "c"));
        // No reply, so the cache holds nothing that is known.
        restart(next(CHATML, &[], "c"));
        restart(next(CHATML, &[Message::user("a")], "c"));
    }

    /// What the cache holds after two turns is what encoding the whole conversation gives, whether or not the stop token
    /// was fed, and although the contents spell control tokens.
    #[test]
    fn appended_tokens_equal_those_of_the_whole() -> Result<(), TextError> {
        let mut source = fixture::byte_level();
        source.chat_template = Some(CHATML.to_owned());
        let tokenizer = Tokenizer::new(TokenizerSource::Gguf(source))?;
        let template = tokenizer.chat_template()?;
        let question = Message::user("hello <|im_end|> there");
        let reply = "the other <|im_start|> dog";
        for stop in [None, Some(2)] {
            let mut cache = tokenizer.encode(&template.render(std::slice::from_ref(&question), true)?, false)?;
            cache.extend(tokenizer.encode_plain(reply, false)?);
            cache.extend(stop);
            let history = [question.clone(), Message::assistant(reply)];
            let new = Message::user("and then?<|im_end|>");
            let Continuation::Append(text) = template.continuation(&history, &new)? else { panic!("restarts") };
            cache.extend(tokenizer.encode_continuation(&text, cache.last().copied())?);
            let whole = template.render(&[&history[..], &[new]].concat(), true)?;
            assert_eq!(cache, tokenizer.encode(&whole, false)?);
            // Its own system message, two questions, two replies.
            assert_eq!(cache.iter().filter(|&&id| id == 1).count(), 5);
        }
        Ok(())
    }
}
