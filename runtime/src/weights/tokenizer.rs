//! The tokenizer that comes with a model.

use std::path::PathBuf;

/// Where the tokenizer of a model is described.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// In the metadata of a GGUF file.
    Gguf(GgufTokenizer),
    /// In `tokenizer.json` and `tokenizer_config.json` of this folder.
    Folder(PathBuf),
}

/// The tokenizer in a GGUF file's metadata. Token ids are indices of `tokens`; those given here exist.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// Kind: `gpt2` is byte-level BPE, `llama` is SentencePiece.
    pub model: String,
    /// Name of the pre-tokenizer (`smollm`, `llama-bpe`, `qwen2`).
    pub pre: Option<String>,
    /// Text of each token, at most one for each row of the embedding.
    pub tokens: Vec<String>,
    /// SentencePiece score of each token.
    pub scores: Option<Vec<f32>>,
    /// Kind of each token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// BPE merges, best first: two tokens with a space between.
    pub merges: Option<Vec<String>>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// Ends a turn.
    pub eot: Option<u32>,
    /// Stands for what has no token.
    pub unknown: Option<u32>,
    /// Fills batches.
    pub padding: Option<u32>,
    /// Whether texts begin with `bos`.
    pub add_bos: Option<bool>,
    /// Whether texts end with `eos`.
    pub add_eos: Option<bool>,
    /// Whether texts are tokenized as if they began with a space.
    pub add_space_prefix: Option<bool>,
    /// Jinja template of a conversation.
    pub chat_template: Option<String>,
}
