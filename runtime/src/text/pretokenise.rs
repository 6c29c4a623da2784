//! How byte-level BPE cuts text into words before it merges: one recipe for each name that `tokenizer.ggml.pre` takes.
//!
//! The patterns are the models' own (published in their `tokenizer.json`; GPT-2's is in OpenAI's `encoder.py`, Llama 3's
//! and Qwen's derive from `cl100k_base` of OpenAI's tiktoken). Which name means which recipe is llama.cpp's convention
//! (`llama-vocab.cpp`), since its converter writes the names.

use tokenizers::{
    NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::{TextError, error::one_line};

/// What becomes of text before BPE, for one family of models.
pub(super) struct Recipe {
    /// Applied to the text first.
    pub(super) normalizer: Option<NormalizerWrapper>,
    /// Cuts it into words and spells them in the byte alphabet.
    pub(super) pre_tokenizer: PreTokenizerWrapper,
    /// Whether a word that is a token is taken whole, whatever its merges would give.
    pub(super) ignore_merges: bool,
    /// Whether texts begin with `bos` where the metadata does not say.
    pub(super) add_bos: bool,
}

/// The names known here.
const SUPPORTED: &str = "smollm, llama-bpe (llama3, llama-v3), qwen2 (deepseek-r1-qwen), gpt-2, default";

/// Words of GPT-2: contractions, letters, digits or other signs with the space before them, and spaces.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Words of Llama 3: line ends apart, digits in groups of up to three.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Words of Qwen 2 and later: as Llama 3, but each digit alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The recipe of the pre-tokenizer `name`; a file that names none gets `default`, as in llama.cpp.
pub(super) fn recipe(name: Option<&str>) -> Result<Recipe, TextError> {
    let spell = ByteLevel::new(false, true, false).into();
    let gpt2 = ByteLevel::new(false, true, true).into();
    let plain = |steps: Vec<PreTokenizerWrapper>| Recipe {
        normalizer: None,
        pre_tokenizer: Sequence::new(steps).into(),
        ignore_merges: false,
        add_bos: false,
    };
    Ok(match name.unwrap_or("default") {
        "smollm" => plain(vec![Digits::new(true).into(), gpt2]),
        "gpt-2" => plain(vec![gpt2]),
        "llama-bpe" | "llama3" | "llama-v3" => {
            Recipe { ignore_merges: true, add_bos: true, ..plain(vec![split(LLAMA3)?, spell]) }
        }
        // llama.cpp does not compose characters; the models' own tokenizers do, and that is what they learned from.
        "qwen2" | "deepseek-r1-qwen" => Recipe { normalizer: Some(NFC.into()), ..plain(vec![split(QWEN2)?, spell]) },
        "default" => plain(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+")?,
            split(GPT2)?,
            split(r"\p{N}+")?,
            split("[0-9][0-9][0-9]")?,
            spell,
        ]),
        name => {
            return Err(TextError::Unsupported { what: "pre-tokenizer", found: name.to_owned(), supported: SUPPORTED });
        }
    })
}

/// Makes each match of `pattern` a word of its own, and what lies between as well.
fn split(pattern: &str) -> Result<PreTokenizerWrapper, TextError> {
    Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false)
        .map(Into::into)
        .map_err(|error| TextError::Encode(one_line(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use tokenizers::{NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    #[test]
    fn words_are_those_of_another_regex_engine() {
        #[derive(Deserialize)]
        struct Case {
            pre: String,
            text: String,
            words: Vec<String>,
        }
        let cases: Vec<Case> =
            serde_json::from_str(include_str!("../../../tests/fixtures/tokenizer/words.json")).unwrap();
        assert!(cases.len() >= 100);
        for case in cases {
            let recipe = recipe(Some(&case.pre)).unwrap();
            let mut text = NormalizedString::from(case.text);
            if let Some(normalizer) = recipe.normalizer {
                normalizer.normalize(&mut text).unwrap();
            }
            let text = text.get().to_owned();
            let mut words = PreTokenizedString::from(text.as_str());
            recipe.pre_tokenizer.pre_tokenize(&mut words).unwrap();
            let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let found: Vec<&str> = splits.iter().map(|(_, (start, end), _)| &text[*start..*end]).collect();
            let found: Vec<&str> = found.into_iter().filter(|word| !word.is_empty()).collect();
            assert_eq!(found, case.words, "{} {text:?}", case.pre);
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let error = recipe(Some("tekken")).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("\"tekken\"") && error.contains("smollm") && error.contains("qwen2"), "{error}");
        assert!(recipe(None).is_ok());
    }
}
