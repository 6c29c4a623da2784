//! A tokenizer from the metadata of a GGUF file.

use std::collections::{BTreeSet, HashSet};

use tokenizers::{
    AddedToken, NormalizerWrapper,
    normalizers::{Prepend, Replace, Sequence},
};

use super::{
    TextError,
    error::one_line,
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
    let space = Replace::new(" ", SPACE.to_string()).map_err(|error| TextError::Encode(one_line(error)))?.into();
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

#[cfg(test)]
mod tests {
    use super::{
        super::{Tokenizer, fixture},
        *,
    };
    use crate::weights::TokenizerSource;
    use proptest::prelude::*;

    fn tokenizer(source: GgufTokenizer) -> Result<Tokenizer, TextError> {
        Tokenizer::new(TokenizerSource::Gguf(source))
    }

    /// Words of `smollm` in ASCII text, cut by hand: single digits; contractions; letters or other signs with one space
    /// before them; spaces, the last of which goes to the word that follows.
    fn words(text: &str) -> Vec<String> {
        let mut words = Vec::new();
        for piece in text.split_inclusive(|c: char| c.is_ascii_digit()) {
            let (rest, digit) = match piece.char_indices().last() {
                Some((at, last)) if last.is_ascii_digit() => piece.split_at(at),
                _ => (piece, ""),
            };
            words.extend(undigited(rest));
            words.extend((!digit.is_empty()).then(|| digit.to_owned()));
        }
        words
    }

    fn undigited(mut text: &str) -> Vec<String> {
        let mut words = Vec::new();
        while !text.is_empty() {
            let contraction = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"].into_iter().find(|it| text.starts_with(it));
            let spaces = text.len() - text.trim_start().len();
            let body = text.strip_prefix(' ').unwrap_or(text);
            let run = |keep: fn(char) -> bool| body.find(|c| !keep(c)).unwrap_or(body.len());
            let letters = run(|c| c.is_ascii_alphabetic());
            let signs = run(|c| !c.is_ascii_alphabetic() && !c.is_ascii_whitespace());
            let length = match (contraction, letters.max(signs)) {
                (Some(contraction), _) => contraction.len(),
                (None, 0) if spaces == text.len() || spaces == 1 => spaces,
                (None, 0) => spaces - 1,
                (None, length) => text.len() - body.len() + length,
            };
            let (word, rest) = text.split_at(length);
            words.push(word.to_owned());
            text = rest;
        }
        words
    }

    /// BPE as it is defined: apply the merges one after the other, each everywhere, from the best on.
    fn slow(text: &str, source: &GgufTokenizer) -> Vec<u32> {
        let merges: Vec<_> = source.merges.iter().flatten().map(|merge| merge.split_once(' ').unwrap()).collect();
        let spell = |word: &str| word.bytes().map(|byte| ALPHABET[usize::from(byte)].to_string()).collect();
        let merged = words(text).into_iter().flat_map(|word| {
            let mut symbols: Vec<String> = spell(&word);
            while let Some(&(left, right)) =
                merges.iter().find(|&&(left, right)| symbols.windows(2).any(|pair| pair == [left, right]))
            {
                fixture::merge(&mut symbols, left, right);
            }
            symbols
        });
        merged.map(|symbol| source.tokens.iter().position(|token| *token == symbol).unwrap() as u32).collect()
    }

    proptest! {
        #[test]
        fn ids_are_those_of_the_definition(
            text in "(the|other|hello|don't|we're|they'll|'s|[a-z]{1,3}|[ \\n\\t]{1,3}|[0-9]{1,3}|[A-Z!?.'-]{1,2}){0,12}"
        ) {
            let source = fixture::byte_level();
            let slow = slow(&text, &source);
            let tokenizer = tokenizer(source).unwrap();
            let ids = tokenizer.encode_plain(&text, false).unwrap();
            prop_assert_eq!(&ids, &slow);
            prop_assert_eq!(tokenizer.decode(&ids), text);
        }

        /// Whatever the lists hold, the answer is a tokenizer or an error.
        #[test]
        fn damaged_metadata_never_panics(
            model in prop_oneof![Just("gpt2"), Just("llama")],
            tokens in proptest::collection::vec("[a-c▁<>]{0,3}", 0..6),
            token_types in proptest::option::of(proptest::collection::vec(-1i32..8, 0..6)),
            merges in proptest::option::of(proptest::collection::vec("[a-c ]{0,4}", 0..4)),
            scores in proptest::option::of(proptest::collection::vec(any::<f32>(), 0..6)),
            bos in proptest::option::of(any::<u32>()),
            whole in any::<bool>(),
        ) {
            let mut source = GgufTokenizer {
                model: model.to_owned(), tokens, token_types, merges, scores, bos, ..GgufTokenizer::default()
            };
            if whole {
                // Complete where it matters, so that what is random gets further.
                let good = if model == "gpt2" { fixture::byte_level() } else { fixture::sentence_piece() };
                source.tokens = [good.tokens, source.tokens].concat();
                source.token_types = source.token_types.map(|types| [good.token_types.unwrap(), types].concat());
                source.scores = source.scores.and_then(|scores| Some([good.scores?, scores].concat()));
                source.merges = source.merges.and_then(|merges| Some([good.merges?, merges].concat()));
            }
            match tokenizer(source) {
                Ok(tokenizer) => {
                    let ids = tokenizer.encode("a<b>▁ c \n", true).unwrap();
                    prop_assert!(ids.iter().all(|&id| tokenizer.token(id).is_some()));
                }
                Err(error) => prop_assert!(!error.to_string().contains('\n')),
            }
        }
    }

    /// Changes a good source and returns the error it then gives.
    fn error(source: fn() -> GgufTokenizer, change: impl FnOnce(&mut GgufTokenizer)) -> String {
        let mut source = source();
        change(&mut source);
        tokenizer(source).unwrap_err().to_string()
    }

    #[test]
    fn what_is_missing_is_named() {
        let bpe = fixture::byte_level;
        let spm = fixture::sentence_piece;
        let cases = [
            (error(bpe, |it| it.tokens.clear()), "has no tokens"),
            (error(bpe, |it| it.merges = None), "has no merges"),
            (error(spm, |it| it.scores = None), "has no scores"),
            (error(bpe, |it| it.token_types = Some(vec![1; 7])), "363 tokens but 7 token types"),
            (error(spm, |it| it.scores = Some(vec![0.5])), "tokens but 1 scores"),
            (error(bpe, |it| it.merges = Some(vec!["h e".into(), "he".into()])), "merge 1 (\"he\") is not two tokens"),
            (error(bpe, |it| it.merges = Some(vec!["h 日".into()])), "merge 0 (\"h 日\") needs \"日\""),
            (error(bpe, |it| it.tokens[4 + 0x71] = "x".into()), "byte 0x71"),
            (error(spm, |it| it.tokens[3 + 0xE9] = "x".into()), "token 236 (\"x\") should name a byte"),
            (error(bpe, |it| it.eos = Some(363)), "the eos token is 363, but the tokenizer has only 363"),
            (error(bpe, |it| it.model = "bert".into()), "\"bert\" is not supported; supported: gpt2, llama"),
            (error(bpe, |it| it.pre = Some("viking".into())), "\"viking\" is not supported"),
        ];
        for (error, part) in cases {
            assert!(error.contains(part) && !error.contains('\n'), "{error:?} lacks {part:?}");
        }
    }

    #[test]
    fn words_that_are_tokens_are_taken_whole_where_the_model_does() {
        let whole = |pre: &str| {
            let mut source = fixture::byte_level();
            source.pre = Some(pre.to_owned());
            // A token that no merge reaches.
            source.tokens.push("Ġzebra".to_owned());
            source.token_types.as_mut().unwrap().push(1);
            let id = source.tokens.len() as u32 - 1;
            tokenizer(source).unwrap().encode_plain(" zebra", false).unwrap() == [id]
        };
        assert!(whole("llama-bpe") && whole("llama3") && !whole("smollm") && !whole("qwen2"));
    }

    #[test]
    fn a_text_begins_and_ends_as_the_model_expects() {
        let ends = |change: fn(&mut GgufTokenizer)| {
            let mut source = fixture::byte_level();
            change(&mut source);
            tokenizer(source).unwrap().encode("a", true).unwrap()
        };
        let a = 4 + u32::from(b'a');
        assert_eq!(ends(|_| ()), [a]);
        assert_eq!(ends(|it| it.pre = Some("llama-bpe".into())), [1, a]);
        assert_eq!(ends(|it| (it.add_bos, it.add_eos) = (Some(true), Some(true))), [1, a, 2]);
        let tokenizer = tokenizer(fixture::sentence_piece()).unwrap();
        let ids = tokenizer.encode("a", true).unwrap();
        assert_eq!(ids[0], 1);
        assert_eq!(tokenizer.encode("<s>a", true).unwrap(), ids, "not twice");
        assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
    }
}
