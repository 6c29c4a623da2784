//! A tokenizer from the metadata of a GGUF file.

use std::collections::HashMap;

use tokenizers::{
    AddedToken, NormalizerWrapper,
    models::bpe::BPE,
    normalizers::{Prepend, Replace, Sequence},
};

use super::{
    TextError,
    pieces::{ALPHABET, Kind, Pieces, SPACE, Spelling, byte_token},
    pretokenise, sentencepiece,
    tokenizer::{Parts, is_stop},
};
use crate::weights::GgufTokenizer;

/// The parts of the tokenizer that `source` describes.
pub(super) fn parts(source: GgufTokenizer) -> Result<Parts, TextError> {
    let tokens = source.tokens.len();
    if tokens == 0 {
        return Err(TextError::NoTokens);
    }
    let lengths = [
        ("scores", source.scores.as_ref().map(Vec::len)),
        ("token types", source.token_types.as_ref().map(Vec::len)),
    ];
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
/// end a turn always do, for some converters file them as text.
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
        if is_stop(text) {
            *kind = Kind::Control;
        }
    }
    kinds
}

/// Byte-level BPE with the merges of the file.
fn byte_level(source: GgufTokenizer) -> Result<Parts, TextError> {
    let kinds = kinds(&source);
    let recipe = pretokenise::recipe(source.pre.as_deref())?;
    let merges = source.merges.as_deref().filter(|merges| !merges.is_empty()).ok_or(TextError::Missing("merges"))?;
    let ids = ids(&source.tokens);
    let known = |text: &str| ids.contains_key(text);
    // Bytes that are rare in text may lack a token (SmolLM2 has none for 21 of them); what text is mostly made of may not.
    if let Some(byte) = (b' '..=b'~').chain([b'\n']).find(|&byte| !known(ALPHABET[byte as usize].encode_utf8(&mut [0; 4])))
    {
        return Err(TextError::NoByteToken(byte));
    }
    let mut joined = String::new();
    let merges = merges
        .iter()
        .enumerate()
        .map(|(index, merge)| {
            let wrong = |reason| TextError::Merge { index, merge: merge.clone(), reason };
            let (left, right) = merge.split_once(' ').ok_or_else(|| wrong("is not two tokens".to_owned()))?;
            joined.clear();
            joined.extend([left, right]);
            match [left, right, &joined].into_iter().find(|&part| !known(part)) {
                Some(missing) => Err(wrong(format!("needs `{missing}`, which is not a token"))),
                None => Ok((left.to_owned(), right.to_owned())),
            }
        })
        .collect::<Result<Vec<_>, TextError>>()?;
    let bpe = build(ids, merges, |bpe| bpe.ignore_merges = recipe.ignore_merges)?;
    let add_bos = source.add_bos.unwrap_or(recipe.add_bos);
    Ok(Parts {
        normalizer: recipe.normalizer,
        pre_tokenizer: Some(recipe.pre_tokenizer),
        strip_space: false,
        ..assemble(source, &kinds, Spelling::ByteLevel, bpe, add_bos)
    })
}

/// SentencePiece: BPE over the whole text, by score, with single bytes for characters that have no piece.
fn sentence_piece(source: GgufTokenizer) -> Result<Parts, TextError> {
    let kinds = kinds(&source);
    let scores = source.scores.as_deref().ok_or(TextError::Missing("scores"))?;
    let wrong = kinds.iter().zip(&source.tokens).position(|(&kind, text)| kind == Kind::Byte && byte_token(text).is_none());
    if let Some(id) = wrong {
        let text = source.tokens[id].clone();
        return Err(TextError::Token { id: id as u32, text, reason: "should name a byte, as `<0x0A>` does" });
    }
    let ids = ids(&source.tokens);
    if let Some(byte) = (0..=u8::MAX).find(|byte| !ids.contains_key(format!("<0x{byte:02X}>").as_str())) {
        return Err(TextError::NoByteToken(byte));
    }
    let merges = sentencepiece::merges(&source.tokens, &kinds, scores, &ids)?;
    let bpe = build(ids, merges, |bpe| bpe.byte_fallback = true)?;
    let strip_space = source.add_space_prefix.unwrap_or(true);
    let space = Replace::new(" ", SPACE).map_err(|error| TextError::Encode(error.to_string()))?.into();
    let normalizer: NormalizerWrapper =
        if strip_space { Sequence::new(vec![Prepend::new(SPACE.into()).into(), space]).into() } else { space };
    let add_bos = source.add_bos.unwrap_or(true);
    Ok(Parts {
        normalizer: Some(normalizer),
        pre_tokenizer: None,
        strip_space,
        ..assemble(source, &kinds, Spelling::SentencePiece, bpe, add_bos)
    })
}

/// The number of each text; of equal texts the last counts, as in llama.cpp.
fn ids(tokens: &[String]) -> HashMap<&str, u32> {
    tokens.iter().zip(0..).map(|(text, id)| (text.as_str(), id)).collect()
}

/// The BPE model with options set by `set`. Merges may name only tokens of `ids`.
fn build(
    ids: HashMap<&str, u32>,
    merges: Vec<(String, String)>,
    set: impl FnOnce(&mut BPE),
) -> Result<BPE, TextError> {
    let mut bpe = super::tokenizer::bpe(ids.into_iter().map(|(text, id)| (text.to_owned(), id)), merges)?;
    set(&mut bpe);
    Ok(bpe)
}

/// What both kinds of tokenizer have in common.
fn assemble(source: GgufTokenizer, kinds: &[Kind], spelling: Spelling, bpe: BPE, add_bos: bool) -> Parts {
    let mut pieces = Pieces::with_capacity(kinds.len());
    let mut added = Vec::new();
    for (text, &kind) in source.tokens.iter().zip(kinds) {
        pieces.push(text, kind, spelling);
        if matches!(kind, Kind::Control | Kind::UserDefined) {
            added.push(AddedToken::from(text.as_str(), kind == Kind::Control).normalized(false));
        }
    }
    let named = source.tokens.iter().zip(0..).filter(|(text, _)| is_stop(text)).map(|(_, id)| id);
    Parts {
        stops: source.eos.into_iter().chain(source.eot).chain(named).collect(),
        prefix: source.bos.filter(|_| add_bos).into_iter().collect(),
        suffix: source.eos.filter(|_| source.add_eos == Some(true)).into_iter().collect(),
        bos: source.bos,
        eos: source.eos,
        template: source.chat_template,
        pieces: pieces.shrink(),
        spelling,
        bpe,
        added,
        normalizer: None,
        pre_tokenizer: None,
        strip_space: false,
    }
}
