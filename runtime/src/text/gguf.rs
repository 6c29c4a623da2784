//! A tokenizer from the metadata of a GGUF file.

use std::collections::{BTreeSet, HashSet};

use tokenizers::{
    AddedToken, NormalizerWrapper,
    normalizers::{Prepend, Replace, Sequence},
};

use super::{
    TextError,
    model::{self, Parts},
    pieces::{ALPHABET, Kind, Pieces, SPACE, Spelling, byte_token},
    pretokenise, sentencepiece,
};
use crate::weights::GgufTokenizer;

/// The parts of the tokenizer that `source` describes.
pub(super) fn parts(source: GgufTokenizer) -> Result<Parts, TextError> {
    let tokens = source.tokens.len();
    if tokens == 0 {
        return Err(TextError::NoTokens);
    }
    let lengths =
        [("scores", source.scores.as_ref().map(Vec::len)), ("token types", source.token_types.as_ref().map(Vec::len))];
    for (what, found) in lengths {
        if let Some(found) = found.filter(|&found| found != tokens) {
            return Err(TextError::Length { what, found, tokens });
        }
    }
    for (what, id) in [("bos", source.bos), ("eos", source.eos), ("eot", source.eot), ("unknown", source.unknown)] {
        if let Some(id) = id.filter(|&id| id as usize >= tokens) {
            return Err(TextError::IdOutOfRange { what: what.to_owned(), id, tokens });
        }
    }
    match source.model.as_str() {
        "gpt2" => byte_level(source),
        "llama" => sentence_piece(source),
        _ => Err(TextError::Unsupported { what: "tokenizer", found: source.model, supported: "gpt2, llama" }),
    }
}

/// What each token is. Where the file says nothing, the tokens that it gives a role steer the model; and tokens known to
/// end a turn always do, for some converters file them as text (as in llama.cpp).
fn kinds(source: &GgufTokenizer) -> Vec<Kind> {
    let mut kinds = match &source.token_types {
        // Numbers of `llama_token_type` in llama.h.
        Some(types) => types
            .iter()
            .map(|kind| match kind {
                2 | 3 => Kind::Control,
                4 => Kind::UserDefined,
                6 => Kind::Byte,
                _ => Kind::Normal,
            })
            .collect(),
        None => {
            let spelled = |text: &String| if byte_token(text).is_some() { Kind::Byte } else { Kind::Normal };
            let mut kinds: Vec<Kind> = match source.model.as_str() {
                "llama" => source.tokens.iter().map(spelled).collect(),
                _ => vec![Kind::Normal; source.tokens.len()],
            };
            for id in [source.bos, source.eos, source.eot, source.unknown].into_iter().flatten() {
                kinds[id as usize] = Kind::Control;
            }
            kinds
        }
    };
    for (kind, text) in kinds.iter_mut().zip(&source.tokens) {
        if model::ENDS.contains(&text.as_str()) {
            *kind = Kind::Control;
        }
    }
    kinds
}

/// Byte-level BPE with the merges of the file.
fn byte_level(mut source: GgufTokenizer) -> Result<Parts, TextError> {
    let recipe = pretokenise::recipe(source.pre.as_deref())?;
    let merges = source.merges.take().filter(|merges| !merges.is_empty()).ok_or(TextError::Missing("merges"))?;
    // Bytes that are rare in text may lack a token (SmolLM2 has none for 21 of them); what text is mostly made of may not.
    let characters: HashSet<&str> = source.tokens.iter().map(String::as_str).filter(|text| text.len() <= 2).collect();
    let has_token = |byte: u8| characters.contains(&*ALPHABET[usize::from(byte)].encode_utf8(&mut [0; 4]));
    if let Some(byte) = (b' '..=b'~').chain([b'\n']).find(|&byte| !has_token(byte)) {
        return Err(TextError::NoByteToken(byte));
    }
    let merges = merges.into_iter().enumerate().map(|(index, merge)| model::pair(index, merge));
    let merges = merges.collect::<Result<_, _>>()?;
    let prefix = source.bos.filter(|_| source.add_bos.unwrap_or(recipe.add_bos));
    let mut parts = assemble(source, Spelling::ByteLevel, merges)?;
    parts.bpe.ignore_merges = recipe.ignore_merges;
    parts.prefix.extend(prefix);
    Ok(Parts { normalizer: recipe.normalizer, pre_tokenizer: Some(recipe.pre_tokenizer), ..parts })
}

/// SentencePiece: BPE over the whole text, by score, with single bytes for characters that have no piece.
fn sentence_piece(source: GgufTokenizer) -> Result<Parts, TextError> {
    let kinds = kinds(&source);
    let scores = source.scores.as_deref().ok_or(TextError::Missing("scores"))?;
    let mut missing: BTreeSet<u8> = (0..=u8::MAX).collect();
    for ((id, text), _) in (0..).zip(&source.tokens).zip(&kinds).filter(|&(_, &kind)| kind == Kind::Byte) {
        let reason = "should name a byte, as `<0x0A>` does";
        missing.remove(&byte_token(text).ok_or_else(|| TextError::Token { id, text: text.clone(), reason })?);
    }
    if let Some(&byte) = missing.first() {
        return Err(TextError::NoByteToken(byte));
    }
    let merges = sentencepiece::merges(&source.tokens, &kinds, scores)?;
    let strip_space = source.add_space_prefix.unwrap_or(true);
    let space = Replace::new(" ", SPACE.to_string()).map_err(|error| TextError::Encode(error.to_string()))?.into();
    let normalizer: NormalizerWrapper =
        if strip_space { Sequence::new(vec![Prepend::new(SPACE.into()).into(), space]).into() } else { space };
    let prefix = source.bos.filter(|_| source.add_bos.unwrap_or(true));
    let mut parts = assemble(source, Spelling::SentencePiece, merges)?;
    parts.bpe.byte_fallback = true;
    parts.prefix.extend(prefix);
    Ok(Parts { normalizer: Some(normalizer), strip_space, ..parts })
}

/// What both kinds of tokenizer have in common. Of tokens with equal texts the last counts, as in llama.cpp.
fn assemble(source: GgufTokenizer, spelling: Spelling, merges: Vec<(String, String)>) -> Result<Parts, TextError> {
    let kinds = kinds(&source);
    let mut pieces = Pieces::with_capacity(kinds.len());
    let mut added = Vec::new();
    for (text, &kind) in source.tokens.iter().zip(&kinds) {
        pieces.push(text, kind, spelling);
        if matches!(kind, Kind::Control | Kind::UserDefined) {
            added.push(AddedToken::from(text.as_str(), kind == Kind::Control).normalized(false));
        }
    }
    Ok(Parts {
        bpe: model::bpe(source.tokens.into_iter().zip(0..).collect(), merges)?,
        normalizer: None,
        pre_tokenizer: None,
        added,
        pieces: pieces.shrink(),
        spelling,
        strip_space: false,
        bos: source.bos,
        eos: source.eos,
        stops: source.eos.into_iter().chain(source.eot).collect(),
        prefix: Vec::new(),
        suffix: source.eos.filter(|_| source.add_eos == Some(true)).into_iter().collect(),
        template: source.chat_template,
    })
}
