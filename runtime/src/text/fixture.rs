//! Small vocabularies for tests.

use std::collections::HashMap;

use super::pieces::ALPHABET;
use crate::weights::GgufTokenizer;

/// What the vocabularies learn from.
const CORPUS: &str = "the quick brown fox jumps over the lazy dog and then the other fox there says hello hello to the dog \
                      user assistant system in the end it is the same as in the beginning don't we're they'll";

/// A byte-level vocabulary: three control tokens, one that the user defined, the bytes, and merges learned from a few
/// words (the most frequent pair first, as BPE is trained).
pub(crate) fn byte_level() -> GgufTokenizer {
    let mut words: Vec<Vec<String>> = CORPUS
        .split(' ')
        .flat_map(|word| [word.to_owned(), format!("Ġ{word}")])
        .map(|word| word.chars().map(String::from).collect())
        .collect();
    let mut merges = Vec::new();
    while merges.len() < 120 {
        let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
        for pair in words.iter().flat_map(|word| word.windows(2)) {
            *counts.entry((&pair[0], &pair[1])).or_default() += 1;
        }
        let Some(((left, right), _)) = counts.into_iter().max_by_key(|&(pair, count)| (count, pair)) else { break };
        let (left, right) = (left.to_owned(), right.to_owned());
        words.iter_mut().for_each(|word| merge(word, &left, &right));
        merges.push(format!("{left} {right}"));
    }
    let mut tokens: Vec<String> = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"].map(String::from).into();
    let mut token_types = vec![3, 3, 3, 4];
    tokens.extend(ALPHABET.map(String::from));
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    token_types.resize(tokens.len(), 1);
    GgufTokenizer {
        model: "gpt2".to_owned(),
        pre: Some("smollm".to_owned()),
        tokens,
        token_types: Some(token_types),
        merges: Some(merges),
        bos: Some(1),
        eos: Some(2),
        ..GgufTokenizer::default()
    }
}

/// Joins each `left` that has a `right` after it.
pub(super) fn merge(word: &mut Vec<String>, left: &str, right: &str) {
    let mut at = 0;
    while at + 1 < word.len() {
        if word[at] == left && word[at + 1] == right {
            let right = word.remove(at + 1);
            word[at].push_str(&right);
        }
        at += 1;
    }
}

/// A SentencePiece vocabulary in Llama 2's order: unknown, control, bytes, pieces (longer ones have better scores, as
/// trained ones mostly do), characters.
pub(super) fn sentence_piece() -> GgufTokenizer {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    let mut token_types = vec![2, 3, 3];
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    token_types.resize(tokens.len(), 6);
    let pieces = [
        "▁the", "hello", "▁hello", "[INST]", "the", "▁th", "hell", "▁he", "llo", "▁t", "th", "he", "ll", "lo", "in",
        "▁▁", "[I", "NST]", "NS", "T]", "ST", "an", "▁a", "é",
    ];
    let characters = "▁abcdefghilnorst[]INST.é日/<>".chars().map(String::from);
    tokens.extend(pieces.map(String::from).into_iter().chain(characters));
    tokens.dedup();
    token_types.resize(tokens.len(), 1);
    let scores = (0..tokens.len()).map(|id| -(id as f32)).collect();
    GgufTokenizer {
        model: "llama".to_owned(),
        tokens,
        scores: Some(scores),
        token_types: Some(token_types),
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        ..GgufTokenizer::default()
    }
}
