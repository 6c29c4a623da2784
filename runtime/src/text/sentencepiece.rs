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
