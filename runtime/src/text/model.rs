//! What a tokenizer is made of, whichever files it came in.

use std::collections::HashMap;

use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, models::bpe::BPE};

use super::{
    TextError,
    pieces::{Pieces, Spelling},
};

/// Names of tokens that end a text or a turn, whatever the file says of them (llama.cpp's list, less those of models
/// that are not of the Llama family).
pub(super) const ENDS: [&str; 7] =
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"];

/// SentencePiece's end of a text: a stop token only where it is a control token, for it is also an HTML tag.
pub(super) const END_OF_TEXT: &str = "</s>";

/// The parts of a tokenizer, checked.
pub(super) struct Parts {
    pub(super) bpe: BPE,
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: Option<PreTokenizerWrapper>,
    /// Tokens that are recognised before anything else; those that are `special` steer the model.
    pub(super) added: Vec<AddedToken>,
    pub(super) pieces: Pieces,
    pub(super) spelling: Spelling,
    /// Whether encoding puts a space before a text, which decoding takes away.
    pub(super) strip_space: bool,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// The tokens that the files say end generation.
    pub(super) stops: Vec<u32>,
    /// Tokens before every text that is encoded with special tokens.
    pub(super) prefix: Vec<u32>,
    /// Tokens after it.
    pub(super) suffix: Vec<u32>,
    pub(super) template: Option<String>,
}

/// The BPE model of these tokens and merges (best first). Fails where a merge names what is not a token.
pub(super) fn bpe(ids: HashMap<String, u32>, merges: Vec<(String, String)>) -> Result<BPE, TextError> {
    let mut joined = String::new();
    for (index, (left, right)) in merges.iter().enumerate() {
        joined.clear();
        joined.extend([left.as_str(), right]);
        if let Some(missing) = [left, right, &joined].into_iter().find(|&part| !ids.contains_key(part)) {
            let reason = format!("needs {missing:?}, which is not a token");
            return Err(TextError::Merge { index, merge: format!("{left} {right}"), reason });
        }
    }
    // Cannot panic: it does so only for a merge that names what is not a token.
    Ok(BPE::new(ids.into_iter().collect(), merges))
}

/// The two tokens of a merge that is written with a space between; `index` is its place among the merges.
pub(super) fn pair(index: usize, merge: String) -> Result<(String, String), TextError> {
    match merge.split_once(' ') {
        Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
        None => Err(TextError::Merge { index, merge, reason: "is not two tokens".to_owned() }),
    }
}
