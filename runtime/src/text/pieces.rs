//! What each token stands for, as bytes: everything decoding needs, in one allocation.

use std::borrow::Cow;

/// SentencePiece's sign for a space.
pub(super) const SPACE: char = '▁';

/// How the texts of a vocabulary spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Each character is a byte, in GPT-2's printable alphabet.
    ByteLevel,
    /// Plain text with `▁` for spaces, and `<0x0A>` for single bytes.
    SentencePiece,
}

/// What a token is, as far as encoding and decoding care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text, spelled as the vocabulary spells it.
    Normal,
    /// Text that is recognised before anything else, and stands for itself.
    UserDefined,
    /// A single byte, `<0x0A>`.
    Byte,
    /// Steers the model; not text.
    Control,
}

/// The bytes of every token.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// End of each token in `bytes`; it begins where the one before ends.
    ends: Vec<u32>,
    /// Control tokens, ascending.
    controls: Vec<u32>,
}

impl Pieces {
    /// No tokens yet, with room for `tokens`.
    pub(super) fn with_capacity(tokens: usize) -> Self {
        Self { bytes: Vec::with_capacity(tokens * 8), ends: Vec::with_capacity(tokens), controls: Vec::new() }
    }

    /// Adds the next token. A control token's bytes are its name.
    pub(super) fn push(&mut self, text: &str, kind: Kind, spelling: Spelling) {
        match (kind, spelling) {
            (Kind::Control, _) => {
                self.controls.push(self.ends.len() as u32);
                self.bytes.extend_from_slice(text.as_bytes());
            }
            (Kind::Byte, _) => self.bytes.extend(byte_token(text)),
            (Kind::Normal, Spelling::ByteLevel) => push_byte_level(text, &mut self.bytes),
            (Kind::UserDefined, Spelling::ByteLevel) => self.bytes.extend_from_slice(text.as_bytes()),
            (Kind::Normal | Kind::UserDefined, Spelling::SentencePiece) => {
                for part in text.split_inclusive(SPACE) {
                    match part.strip_suffix(SPACE) {
                        Some(word) => self.bytes.extend(word.bytes().chain([b' '])),
                        None => self.bytes.extend_from_slice(part.as_bytes()),
                    }
                }
            }
        }
        self.ends.push(self.bytes.len() as u32);
    }

    /// Gives back what growing left over.
    pub(super) fn shrink(mut self) -> Self {
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
        self
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether `id` is a control token.
    pub(super) fn is_control(&self, id: u32) -> bool {
        self.controls.binary_search(&id).is_ok()
    }

    /// The control tokens, ascending.
    pub(super) fn controls(&self) -> &[u32] {
        &self.controls
    }

    /// The bytes of token `id`, if there is one.
    pub(super) fn bytes(&self, id: u32) -> Option<&[u8]> {
        let id = usize::try_from(id).ok()?;
        let end = *self.ends.get(id)?;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        Some(&self.bytes[start as usize..end as usize])
    }

    /// Token `id` for display: what is no whole character shows as U+FFFD.
    pub(super) fn text(&self, id: u32) -> Option<Cow<'_, str>> {
        self.bytes(id).map(String::from_utf8_lossy)
    }
}

/// The byte that `<0x0A>` stands for.
pub(super) fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// Appends the bytes that `text` spells in GPT-2's alphabet, or, where it uses other characters, `text` itself.
fn push_byte_level(text: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for character in text.chars() {
        match BYTE_OF.get(character as usize) {
            Some(&Some(byte)) => bytes.push(byte),
            _ => {
                bytes.truncate(start);
                return bytes.extend_from_slice(text.as_bytes());
            }
        }
    }
}

/// GPT-2's alphabet: each byte as a printable character (`bytes_to_unicode` in OpenAI's `encoder.py`). Printable Latin-1
/// stands for itself; the other bytes, in order, are the characters from U+0100.
pub(super) const ALPHABET: [char; 256] = {
    let mut alphabet = ['\0'; 256];
    let (mut byte, mut others) = (0, 0);
    while byte < 256 {
        alphabet[byte] = if matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) {
            byte as u8 as char
        } else {
            others += 1;
            match char::from_u32(0xFF + others) {
                Some(character) => character,
                None => unreachable!(),
            }
        };
        byte += 1;
    }
    alphabet
};

/// [`ALPHABET`] the other way round.
const BYTE_OF: [Option<u8>; 324] = {
    let mut bytes = [None; 324];
    let mut byte = 0;
    while byte < 256 {
        bytes[ALPHABET[byte] as usize] = Some(byte as u8);
        byte += 1;
    }
    bytes
};

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_alphabet_is_that_of_the_tokenizers_crate() {
        let ours: BTreeSet<char> = ALPHABET.into_iter().collect();
        assert_eq!(ours, ByteLevel::alphabet().into_iter().collect());
        assert_eq!((ALPHABET[b' ' as usize], ALPHABET[b'\n' as usize], ALPHABET[0xAD]), ('Ġ', 'Ċ', 'Ń'));
    }

    #[test]
    fn each_spelling_gives_its_bytes() {
        let mut pieces = Pieces::with_capacity(0);
        pieces.push("Ġé", Kind::Normal, Spelling::ByteLevel);
        pieces.push("日", Kind::Normal, Spelling::ByteLevel);
        pieces.push("<think>", Kind::UserDefined, Spelling::ByteLevel);
        pieces.push("</s>", Kind::Control, Spelling::SentencePiece);
        pieces.push("▁a▁▁b", Kind::Normal, Spelling::SentencePiece);
        pieces.push("<0xE6>", Kind::Byte, Spelling::SentencePiece);
        let bytes: Vec<_> = (0..7).map(|id| pieces.bytes(id)).collect();
        assert_eq!(bytes[0], Some(&b" \xE9"[..]));
        assert_eq!(bytes[1], Some("日".as_bytes()));
        assert_eq!(bytes[2], Some(&b"<think>"[..]));
        assert_eq!(bytes[4], Some(&b" a  b"[..]));
        assert_eq!(bytes[5], Some(&b"\xE6"[..]));
        assert_eq!(bytes[6], None);
        assert_eq!((pieces.controls(), pieces.len()), (&[3][..], 6));
        assert_eq!(pieces.text(3).unwrap(), "</s>");
    }
}
