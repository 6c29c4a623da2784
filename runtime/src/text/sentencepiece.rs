//! SentencePiece's BPE from scores: which two pieces join into which, best first.

use std::collections::HashMap;

use super::{TextError, pieces::Kind};

/// Longest piece that is taken apart, in bytes; trained ones have at most a few dozen. Every cut of a piece is looked up,
/// so a longer one would make a damaged file slow to load.
const LONGEST: usize = 512;

/// The merges that reach each ordinary piece from two others, ordered as SentencePiece would apply them: the piece with
/// the highest score first, and of equal ones the one with the lower id.
///
/// SentencePiece (and llama.cpp's `llm_tokenizer_spm`) joins the neighbours whose union has the best score, leftmost
/// first. That is BPE with these merges, except where different pieces share one score. Control and byte tokens take no
/// part, so no text merges into one.
pub(super) fn merges(tokens: &[String], kinds: &[Kind], scores: &[f32]) -> Result<Vec<(String, String)>, TextError> {
    let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
    let part = |text: &str| ids.get(text).copied().filter(|&id| kinds[id as usize] == Kind::Normal);
    let mut joins = Vec::new();
    for (id, text) in tokens.iter().enumerate() {
        let id = id as u32;
        if part(text) != Some(id) {
            continue;
        }
        if text.len() > LONGEST {
            let text = text.chars().take(32).collect();
            return Err(TextError::Token { id, text, reason: "is longer than any piece of text; the file is damaged" });
        }
        for (cut, _) in text.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (part(&text[..cut]), part(&text[cut..])) {
                joins.push((id, left, right));
            }
        }
    }
    joins.sort_unstable_by(|a, b| scores[b.0 as usize].total_cmp(&scores[a.0 as usize]).then(a.cmp(b)));
    let text = |id: u32| tokens[id as usize].clone();
    Ok(joins.into_iter().map(|(_, left, right)| (text(left), text(right))).collect())
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Tokenizer, fixture},
        *,
    };
    use crate::weights::TokenizerSource;
    use proptest::prelude::*;

    /// SentencePiece as it is defined: of all neighbours that make a piece, join the best, the leftmost of equals; spell
    /// what remains unknown in bytes.
    fn slow(text: &str, tokens: &[String], scores: &[f32]) -> Vec<u32> {
        let id = |text: &str| tokens.iter().rposition(|token| token == text);
        let mut symbols: Vec<String> = text.replace(' ', "▁").chars().map(String::from).collect();
        if !symbols.is_empty() {
            symbols.insert(0, "▁".to_owned());
        }
        loop {
            let joins = symbols.windows(2).enumerate().filter_map(|(at, pair)| Some((at, id(&pair.concat())?)));
            let best = joins.max_by(|a, b| scores[a.1].total_cmp(&scores[b.1]).then(b.0.cmp(&a.0)));
            let Some((at, _)) = best else { break };
            let right = symbols.remove(at + 1);
            symbols[at].push_str(&right);
        }
        let ids = symbols.iter().flat_map(|symbol| match id(symbol) {
            Some(id) => vec![id],
            None => symbol.bytes().map(|byte| id(&format!("<0x{byte:02X}>")).unwrap()).collect(),
        });
        ids.map(|id| id as u32).collect()
    }

    proptest! {
        #[test]
        fn ids_are_those_of_the_definition(text in "(hello|the| |  |th|in|é|日|🦙|[INST]|\\n|[a-t.]){0,12}") {
            let source = fixture::sentence_piece();
            let slow = slow(&text, &source.tokens, source.scores.as_ref().unwrap());
            let tokenizer = Tokenizer::new(TokenizerSource::Gguf(source)).unwrap();
            let ids = tokenizer.encode_plain(&text, false).unwrap();
            prop_assert_eq!(&ids, &slow);
            prop_assert_eq!(tokenizer.decode(&ids), text);
        }
    }

    #[test]
    fn control_tokens_are_never_the_result_of_a_merge() {
        let tokens = ["<s>", "<", "s>", "s", ">", "<s"].map(String::from);
        let kinds = [Kind::Control, Kind::Normal, Kind::Normal, Kind::Normal, Kind::Normal, Kind::Normal];
        let merges = merges(&tokens, &kinds, &[0.0; 6]).unwrap();
        let joined: Vec<String> = merges.into_iter().map(|(left, right)| left + &right).collect();
        assert_eq!(joined, ["s>", "<s"]);
    }

    #[test]
    fn an_endless_piece_is_refused() {
        let error = merges(&["x".repeat(100_000)], &[Kind::Normal], &[0.0]).unwrap_err();
        assert!(error.to_string().contains("token 0"), "{error}");
    }
}
