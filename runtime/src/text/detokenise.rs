//! Token ids back to text, as they come.

use std::sync::Arc;

use super::pieces::Pieces;

/// Turns a stream of tokens into text, in whole characters.
///
/// A character may be spread over several tokens; its bytes wait until it is complete. Bytes that can no longer become
/// valid UTF-8 come out as U+FFFD, one for each maximal invalid sequence, as [`String::from_utf8_lossy`] does. So what
/// all the calls return, joined, is what decoding all tokens at once gives. Control tokens and ids outside the
/// vocabulary (an embedding may have more rows than there are tokens) give no text.
#[derive(Clone, Debug)]
pub struct Detokeniser {
    pieces: Arc<Pieces>,
    /// Whether the next text begins with a space that only the spelling put there.
    strip_space: bool,
    /// Bytes of a character that is not complete yet, at most three between calls.
    pending: Vec<u8>,
    text: String,
}

impl Detokeniser {
    pub(super) fn new(pieces: Arc<Pieces>, strip_space: bool) -> Self {
        Self { pieces, strip_space, pending: Vec::new(), text: String::new() }
    }

    /// For tokens that continue a text in the middle: keeps the space that a SentencePiece text would lose at its start.
    pub fn continuing(mut self) -> Self {
        self.strip_space = false;
        self
    }

    /// Takes the next token and returns the characters it completes, perhaps none.
    pub fn push(&mut self, id: u32) -> &str {
        if let Some(bytes) = self.pieces.bytes(id).filter(|bytes| !bytes.is_empty() && !self.pieces.is_control(id)) {
            let space = std::mem::take(&mut self.strip_space) && bytes[0] == b' ';
            self.pending.extend_from_slice(&bytes[usize::from(space)..]);
        }
        self.take(false)
    }

    /// Ends the stream: returns U+FFFD for a character that was left incomplete.
    pub fn finish(&mut self) -> &str {
        self.take(true)
    }

    /// Moves what is decided from `pending` to `text`; at the `end` everything is.
    fn take(&mut self, end: bool) -> &str {
        self.text.clear();
        let mut taken = 0;
        while taken < self.pending.len() {
            let rest = &self.pending[taken..];
            let error = match std::str::from_utf8(rest) {
                Ok(valid) => {
                    self.text.push_str(valid);
                    taken = self.pending.len();
                    break;
                }
                Err(error) => error,
            };
            let valid = &rest[..error.valid_up_to()];
            self.text.push_str(std::str::from_utf8(valid).unwrap_or_default());
            taken += valid.len();
            match error.error_len() {
                Some(invalid) => taken += invalid,
                None if end => taken = self.pending.len(),
                None => break,
            }
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        self.pending.drain(..taken);
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::pieces::{ALPHABET, Kind, Spelling},
        *,
    };
    use proptest::prelude::*;

    /// A byte-level vocabulary of all bytes, some longer pieces and a control token, number 256.
    fn byte_level() -> Arc<Pieces> {
        let mut pieces = Pieces::with_capacity(300);
        for character in ALPHABET {
            pieces.push(&character.to_string(), Kind::Normal, Spelling::ByteLevel);
        }
        pieces.push("<|end|>", Kind::Control, Spelling::ByteLevel);
        for text in ["Ġthe", "âĢ", "ĻðŁ", "é"] {
            pieces.push(text, Kind::Normal, Spelling::ByteLevel);
        }
        Arc::new(pieces.shrink())
    }

    fn sentence_piece() -> Arc<Pieces> {
        let mut pieces = Pieces::with_capacity(300);
        for byte in 0..=255u8 {
            pieces.push(&format!("<0x{byte:02X}>"), Kind::Byte, Spelling::SentencePiece);
        }
        pieces.push("</s>", Kind::Control, Spelling::SentencePiece);
        for text in ["▁the", "▁", "é▁", "🦙"] {
            pieces.push(text, Kind::Normal, Spelling::SentencePiece);
        }
        Arc::new(pieces)
    }

    /// Decoding without a stream.
    fn whole(pieces: &Pieces, ids: &[u32], strip_space: bool) -> String {
        let text = ids.iter().filter(|&&id| !pieces.is_control(id)).filter_map(|&id| pieces.bytes(id));
        let bytes = text.collect::<Vec<_>>().concat();
        let bytes = bytes.strip_prefix(b" ").filter(|_| strip_space).unwrap_or(&bytes);
        String::from_utf8_lossy(bytes).into_owned()
    }

    fn stream(pieces: &Arc<Pieces>, ids: &[u32], strip_space: bool) -> String {
        let mut stream = Detokeniser::new(Arc::clone(pieces), strip_space);
        let mut text: String = ids.iter().map(|&id| stream.push(id).to_owned()).collect();
        text.push_str(stream.finish());
        text
    }

    #[test]
    fn a_character_comes_whole_and_as_soon_as_it_can() {
        let mut stream = Detokeniser::new(sentence_piece(), true);
        let llama: Vec<u32> = "🦙".bytes().map(u32::from).collect();
        assert_eq!(stream.push(257), "the");
        assert_eq!(stream.push(llama[0]), "");
        assert_eq!(stream.push(llama[1]), "");
        assert_eq!(stream.push(256), "", "a control token in between changes nothing");
        assert_eq!((stream.push(llama[2]).len(), stream.push(llama[3])), (0, "🦙"));
        stream.push(llama[0]);
        assert_eq!(stream.push(257), "\u{FFFD} the", "no longer completable");
        stream.push(llama[0]);
        assert_eq!(stream.finish(), "\u{FFFD}");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn the_leading_space_goes_only_where_it_was_added() {
        let pieces = sentence_piece();
        assert_eq!(stream(&pieces, &[256, 258, 257], true), " the", "one space only, after control tokens");
        assert_eq!(Detokeniser::new(pieces, true).continuing().push(257), " the");
    }

    proptest! {
        #[test]
        fn the_stream_joined_is_the_whole(ids in proptest::collection::vec(0u32..265, 0..60), strip in any::<bool>()) {
            for pieces in [byte_level(), sentence_piece()] {
                prop_assert_eq!(stream(&pieces, &ids, strip), whole(&pieces, &ids, strip));
            }
        }

        /// Random bytes are rarely long characters, so cut real text at every byte too.
        #[test]
        fn text_survives_being_cut_into_bytes(text in "\\PC{0,40}") {
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            let mut stream = Detokeniser::new(byte_level(), false);
            let mut joined = String::new();
            for (at, &id) in ids.iter().enumerate() {
                joined.push_str(stream.push(id));
                let complete = (0..=at + 1).rev().find(|&end| text.is_char_boundary(end)).unwrap();
                prop_assert_eq!(&joined, &text[..complete]);
            }
            prop_assert_eq!(stream.finish(), "");
        }
    }
}
