//! Long prompts with one fact somewhere in them.

use super::EvalError;
use crate::text::{TextError, Tokenizer};

/// What surrounds a fact, as tokens.
#[derive(Clone, Debug)]
pub(super) struct Haystack {
    tokens: Vec<u32>,
    /// After how many tokens a sentence ends, ascending; 0 first.
    ends: Vec<usize>,
}

/// A prompt's tokens around its haystack.
#[derive(Clone, Debug)]
pub(super) struct Around {
    /// What the model expects before a text.
    pub before: Vec<u32>,
    /// What is to be found, a sentence or some.
    pub fact: Vec<u32>,
    /// What asks for it at the end.
    pub question: Vec<u32>,
}

impl Haystack {
    /// A text. A fact comes where a sentence ends and space follows, so that it does not run into a word; there is space
    /// before the first sentence too.
    pub fn new(tokenizer: &Tokenizer, text: &str) -> Result<Self, TextError> {
        let space = if text.starts_with(char::is_whitespace) { "" } else { " " };
        let tokens = tokenizer.encode_plain(&format!("{space}{text}"), false)?;
        let spelled = |token: u32| tokenizer.token(token).unwrap_or_default();
        let ends = tokens.windows(2).enumerate().filter(|(_, pair)| {
            let (token, next) = (spelled(pair[0]), spelled(pair[1]));
            token.ends_with(['.', '!', '?', '\n']) && next.starts_with(char::is_whitespace)
        });
        let ends = [0].into_iter().chain(ends.map(|(at, _)| at + 1)).collect();
        Ok(Self { tokens, ends })
    }

    /// Tokens that there are.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// A prompt of `length` tokens whose fact comes after `depth` percent of its haystack, to the nearest end of a sentence.
    /// The haystack begins with a sentence, at `share` (0 to 1) of where it could.
    ///
    /// # Errors
    /// [`EvalError::ShortPrompt`] where fact and question alone take as many tokens, [`EvalError::ShortText`] where the text
    /// has not so many.
    pub fn prompt(&self, around: &Around, length: usize, depth: usize, share: f64) -> Result<Vec<u32>, EvalError> {
        let Around { before, fact, question } = around;
        let taken = before.len() + fact.len() + question.len();
        let Some(room) = length.checked_sub(taken).filter(|&room| room > 0) else {
            return Err(EvalError::ShortPrompt { length, least: taken + 1 });
        };
        let Some(last) = self.len().checked_sub(room) else {
            return Err(EvalError::ShortText { needed: room, available: self.len() });
        };
        let first = self.ends[self.ends.partition_point(|&end| end as f64 <= share * last as f64).max(1) - 1];
        let hay = &self.tokens[first..first + room];
        let asked = room * depth / 100;
        let ends = self.ends.iter().filter_map(|end| end.checked_sub(first)).filter(|&end| end < room).chain([room]);
        let cut = ends.min_by_key(|end| end.abs_diff(asked)).unwrap_or(asked);
        Ok([before, &hay[..cut], fact, &hay[cut..], question].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{text::fixture, weights::TokenizerSource};

    fn tokenizer() -> Tokenizer {
        Tokenizer::new(TokenizerSource::Gguf(fixture::byte_level())).unwrap()
    }

    #[test]
    fn facts_come_between_sentences_and_prompts_have_the_length_asked_for() {
        let tokenizer = tokenizer();
        let text = " One is 1.5 of it. Two? Yes! Three.\n\nFour is the end of it all, and no more than that";
        let hay = Haystack::new(&tokenizer, text).unwrap();
        let encode = |text| tokenizer.encode_plain(text, false).unwrap();
        let around = Around { before: vec![3], fact: encode("<F>"), question: encode("<Q>") };
        let taken = 1 + around.fact.len() + around.question.len();
        let prompt = |length: usize, depth, share| {
            let tokens = hay.prompt(&around, length, depth, share).unwrap();
            assert_eq!((tokens.len(), tokens[0]), (length, 3));
            tokenizer.decode(&tokens[1..])
        };
        let whole = taken + hay.len();
        assert_eq!(prompt(whole, 0, 0.0), format!("<F>{text}<Q>"));
        assert_eq!(prompt(whole, 100, 0.0), format!("{text}<F><Q>"));
        for depth in 0..=100 {
            let prompt = prompt(whole, depth, 0.0);
            let (before, _) = prompt.split_once("<F>").unwrap();
            assert!(before.is_empty() || before == text || before.ends_with(['.', '?', '!', '\n']), "{prompt}");
            assert!(!before.ends_with("1.") && !before.ends_with("\n\n"), "{prompt}");
            assert_eq!(prompt.replace("<F>", ""), format!("{text}<Q>"));
        }
        // A part of it begins with a sentence.
        let part = prompt(taken + encode(" Two? Yes").len(), 0, 0.9);
        assert!(part.starts_with("<F> Two") || part.starts_with("<F>\n") || part.starts_with("<F> Three"), "{part}");
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let tokenizer = tokenizer();
        let hay = Haystack::new(&tokenizer, "A text. Of some length.").unwrap();
        let around = Around { before: vec![], fact: vec![5; 4], question: vec![6; 3] };
        let error = hay.prompt(&around, 7, 0, 0.0).unwrap_err();
        assert!(matches!(error, EvalError::ShortPrompt { length: 7, least: 8 }), "{error}");
        let error = hay.prompt(&around, 8 + hay.len(), 0, 0.0).unwrap_err();
        assert!(matches!(error, EvalError::ShortText { .. }), "{error}");
    }
}
