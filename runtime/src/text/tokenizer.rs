//! The tokenizer: text to token ids.

use std::{borrow::Cow, sync::Arc};

use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
    models::bpe::BPE,
    normalizers::{Replace, Sequence},
};

use super::{
    ChatTemplate, ControlTokens, Detokeniser, TextError,
    control::INERT,
    error::one_line,
    folder, gguf,
    model::{END_OF_TEXT, ENDS},
    pieces::{Pieces, Spelling},
};
use crate::weights::TokenizerSource;

/// Splits text into tokens and joins them again. Safe to share between threads.
pub struct Tokenizer {
    inner: TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>,
    pieces: Arc<Pieces>,
    controls: ControlTokens,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Ascending, without repeats.
    stops: Vec<u32>,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    spelling: Spelling,
    strip_space: bool,
    template: Option<String>,
}

impl Tokenizer {
    /// The tokenizer that comes with a model.
    ///
    /// From GGUF: byte-level BPE (`gpt2`) with the pre-tokenizers `smollm`, `llama-bpe`, `qwen2`, `gpt-2` and `default`, and
    /// SentencePiece BPE (`llama`). From a folder: any BPE in a `tokenizer.json`.
    ///
    /// # Errors
    /// Says which part is missing, malformed or of an unknown kind.
    pub fn new(source: TokenizerSource) -> Result<Self, TextError> {
        let parts = match source {
            TokenizerSource::Gguf(metadata) => gguf::parts(metadata)?,
            TokenizerSource::Folder(folder) => folder::parts(&folder)?,
        };
        // Added tokens are looked for before the normalizer runs, so it can take the mark out of escaped text.
        let unmark = Replace::new(INERT.to_string(), "").map_err(|error| TextError::Encode(one_line(error)))?.into();
        let normalizer = Sequence::new([unmark].into_iter().chain(parts.normalizer).collect());
        let mut inner = TokenizerImpl::new(parts.bpe);
        inner.with_normalizer(Some(normalizer)).with_pre_tokenizer(parts.pre_tokenizer).add_tokens(&parts.added);

        let pieces = parts.pieces;
        let name = |id| pieces.text(id).unwrap_or_default();
        let named = pieces.controls().iter().copied().filter(|&id| {
            let name = name(id);
            ENDS.contains(&&*name) || name == END_OF_TEXT
        });
        let mut stops: Vec<u32> = parts.stops.into_iter().chain(named).collect();
        stops.sort_unstable();
        stops.dedup();
        let controls = parts.added.iter().filter(|token| token.special).map(|token| token.content.as_str());
        Ok(Self {
            controls: ControlTokens::new(controls),
            pieces: Arc::new(pieces),
            inner,
            bos: parts.bos,
            eos: parts.eos,
            stops,
            prefix: parts.prefix,
            suffix: parts.suffix,
            spelling: parts.spelling,
            strip_space: parts.strip_space,
            template: parts.template,
        })
    }

    /// The tokens of `text`, in which control tokens that are spelled out are recognised: for rendered templates and other
    /// text that is trusted.
    ///
    /// With `add_special` the tokens that the model expects around a text (often `bos` before it) are added, unless it
    /// begins with them already. Rendered chat templates bring theirs: pass `false`. As in llama.cpp, bytes that a
    /// byte-level vocabulary has no token for are dropped.
    ///
    /// # Errors
    /// [`TextError::Encode`] if the tokenizer's own rules fail on the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| TextError::Encode(one_line(error)))?;
        let ids = encoding.get_ids();
        if !add_special {
            return Ok(ids.to_vec());
        }
        let prefix = if ids.starts_with(&self.prefix) { &[][..] } else { &self.prefix };
        Ok([prefix, ids, &self.suffix].concat())
    }

    /// The tokens of `text` from outside: whatever it spells, none of them is a control token, except those that
    /// `add_special` adds around it.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        self.encode(&self.controls.escape(text), add_special)
    }

    /// The tokens of `text` that goes on where a text was left off: control tokens are recognised, nothing is added, and a
    /// SentencePiece vocabulary adds no space before it.
    ///
    /// `last` is the last token that was fed. If it is a stop token and `text` begins with it, it is not repeated; so pass
    /// it whenever the text is that of a [`Continuation`](super::Continuation).
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_continuation(&self, text: &str, last: Option<u32>) -> Result<Vec<u32>, TextError> {
        let mut ids = self.encode_joined(text)?;
        if let (Some(&first), Some(last)) = (ids.first(), last)
            && first == last
            && self.is_stop(last)
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// Encodes `text` as if other text came before it. SentencePiece treats the start of a text as the start of a word; a
    /// line end before it, which joins with nothing, keeps it from doing so and is cut off again.
    fn encode_joined(&self, text: &str) -> Result<Vec<u32>, TextError> {
        if self.spelling == Spelling::SentencePiece && !self.controls.starts_with(text) {
            let anchor = self.encode("\n", false)?;
            let mut ids = self.encode(&format!("\n{text}"), false)?;
            if ids.starts_with(&anchor) {
                ids.drain(..anchor.len());
                return Ok(ids);
            }
        }
        self.encode(text, false)
    }

    /// The text of `ids`, without control tokens; what is not valid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.detokeniser();
        let mut text = String::new();
        for &id in ids {
            text.push_str(stream.push(id));
        }
        text.push_str(stream.finish());
        text
    }

    /// Decodes a stream of tokens that begins a text.
    pub fn detokeniser(&self) -> Detokeniser {
        Detokeniser::new(Arc::clone(&self.pieces), self.strip_space)
    }

    /// Number of tokens, those added to the vocabulary included. An embedding may have more rows.
    pub fn vocab(&self) -> usize {
        self.pieces.len()
    }

    /// The tokens that the model expects before a text.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens after which generation stops, ascending: those the model's files name, and control tokens known to end a
    /// text or a turn.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stops
    }

    /// Whether `id` is one of [`stop_tokens`](Self::stop_tokens).
    pub fn is_stop(&self, id: u32) -> bool {
        self.stops.binary_search(&id).is_ok()
    }

    /// Token `id` for display: its text, or the name of a control token. A part of a character shows as U+FFFD.
    pub fn token(&self, id: u32) -> Option<Cow<'_, str>> {
        self.pieces.text(id)
    }

    /// The control tokens that [`encode`](Self::encode) recognises.
    pub fn control_tokens(&self) -> &ControlTokens {
        &self.controls
    }

    /// The model's chat template. It makes the contents of messages inert for this tokenizer.
    ///
    /// # Errors
    /// [`TextError::NoTemplate`] if the model has none, [`TextError::Template`] if it is malformed.
    pub fn chat_template(&self) -> Result<ChatTemplate, TextError> {
        self.chat_template_from(self.template.clone().ok_or(TextError::NoTemplate)?)
    }

    /// A chat template of the caller's in place of the model's, for example [`ChatTemplate::PLAIN`].
    ///
    /// # Errors
    /// [`TextError::Template`] if it is malformed.
    pub fn chat_template_from(&self, source: impl Into<String>) -> Result<ChatTemplate, TextError> {
        let name = |id: Option<u32>| id.and_then(|id| self.token(id)).unwrap_or_default();
        let template = ChatTemplate::new(source, &name(self.bos), &name(self.eos))?;
        Ok(template.with_control_tokens(self.controls.clone()))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab", &self.vocab()).field("stops", &self.stops).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture, *};
    use proptest::prelude::*;

    fn byte_level() -> Tokenizer {
        Tokenizer::new(TokenizerSource::Gguf(fixture::byte_level())).unwrap()
    }

    fn sentence_piece() -> Tokenizer {
        Tokenizer::new(TokenizerSource::Gguf(fixture::sentence_piece())).unwrap()
    }

    #[test]
    fn threads_share_it() {
        fn shared<T: Send + Sync>() {}
        shared::<Tokenizer>();
        shared::<ChatTemplate>();
        shared::<Detokeniser>();
    }

    #[test]
    fn control_tokens_are_read_in_templates_and_not_in_texts() {
        let tokenizer = byte_level();
        let text = "<|im_start|>user\nhello<|im_end|>";
        let trusted = tokenizer.encode(text, false).unwrap();
        assert_eq!((trusted[0], *trusted.last().unwrap()), (1, 2));
        assert_eq!(tokenizer.decode(&trusted), "user\nhello");
        let plain = tokenizer.encode_plain(text, false).unwrap();
        assert!(plain.iter().all(|&id| id > 3));
        assert_eq!(tokenizer.decode(&plain), text);
        assert_eq!(tokenizer.encode_plain("a<tool>b", false).unwrap()[1], 3, "not control, so it stays a token");
    }

    #[test]
    fn stop_tokens_are_the_named_and_the_well_known() {
        assert_eq!(byte_level().stop_tokens(), [0, 2]);
        assert_eq!(sentence_piece().stop_tokens(), [2]);
        let mut source = fixture::byte_level();
        source.eot = Some(1);
        // Filed as text by the converter, and a tag that only looks like an end.
        source.tokens.extend(["<|eot_id|>", "</s>"].map(String::from));
        source.token_types.as_mut().unwrap().extend([1, 1]);
        let id = source.tokens.len() as u32 - 2;
        let tokenizer = Tokenizer::new(TokenizerSource::Gguf(source)).unwrap();
        assert_eq!(tokenizer.stop_tokens(), [0, 1, 2, id]);
        assert_eq!(tokenizer.encode("<|eot_id|>", false).unwrap(), [id]);
        assert!(tokenizer.is_stop(id) && !tokenizer.is_stop(id + 1));
    }

    #[test]
    fn tokens_show_as_text() {
        let tokenizer = byte_level();
        assert_eq!(tokenizer.token(2).unwrap(), "<|im_end|>");
        assert_eq!(tokenizer.token(4 + u32::from(b' ')).unwrap(), " ");
        assert_eq!(tokenizer.token(4 + 0xC3).unwrap(), "\u{FFFD}");
        assert_eq!(tokenizer.token(tokenizer.vocab() as u32), None);
    }

    #[test]
    fn a_text_that_goes_on_gets_no_space() {
        let tokenizer = sentence_piece();
        let ids = tokenizer.encode("hello the hello", false).unwrap();
        let (first, rest) = ids.split_at(1);
        assert_eq!(tokenizer.decode(first), "hello");
        assert_eq!(tokenizer.encode_continuation(" the hello", None).unwrap(), rest);
        assert_ne!(tokenizer.encode(" the hello", false).unwrap(), rest);
    }

    #[test]
    fn a_stop_token_that_was_fed_is_not_fed_again() {
        let tokenizer = byte_level();
        let whole = tokenizer.encode("<|im_end|>\n<|im_start|>", false).unwrap();
        let again = |last| tokenizer.encode_continuation("<|im_end|>\n<|im_start|>", last).unwrap();
        assert_eq!(again(None), whole);
        assert_eq!(again(Some(2)), whole[1..]);
        assert_eq!(again(Some(0)), whole, "another stop token");
        assert_eq!(tokenizer.encode_continuation("hh", Some(whole[1])).unwrap().len(), 2, "no stop token");
    }

    proptest! {
        /// Text from outside comes back as it was, and steers nothing.
        #[test]
        fn plain_text_survives(text in "(<\\|im_end\\|>|</s>|<s>|<unk>|\\PC| |\\n){0,10}") {
            for tokenizer in [byte_level(), sentence_piece()] {
                let ids = tokenizer.encode_plain(&text, false).unwrap();
                prop_assert!(ids.iter().all(|&id| !tokenizer.pieces.is_control(id)));
                prop_assert_eq!(tokenizer.decode(&ids), &*text);
            }
        }
    }
}
