//! A tokenizer from the files of a Hugging Face folder.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::Path,
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

use super::{
    TemplateSource, TextError,
    error::one_line,
    model::{self, Parts},
    pieces::{Kind, Pieces, SPACE, Spelling, byte_token},
};

/// The file that names special tokens and, in older models, holds the chat template.
const CONFIG: &str = "tokenizer_config.json";

/// `tokenizer.json`, as far as it matters here. Reading it into the `tokenizers` crate's own types would build a tree of
/// the whole vocabulary first.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Bpe,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Files written before 2024 join the two tokens with a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

/// `tokenizer_config.json`, and `special_tokens_map.json`, which has a part of it.
#[derive(Default, Deserialize)]
struct Config {
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Token { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

/// `generation_config.json`.
#[derive(Default, Deserialize)]
struct Generation {
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

/// The parts of the tokenizer in `folder`: `tokenizer.json`, and, where they exist, `tokenizer_config.json`,
/// `special_tokens_map.json`, `generation_config.json` and `chat_template.jinja`.
pub(super) fn parts(folder: &Path) -> Result<Parts, TextError> {
    let json = tokenizer_json(&folder.join("tokenizer.json"))?;
    let config: Config = optional(&folder.join(CONFIG))?;
    let map: Config = optional(&folder.join("special_tokens_map.json"))?;
    let generation: Generation = optional(&folder.join("generation_config.json"))?;
    let template = template_or(folder, config.chat_template)?.map(|template| template.text);

    let (spelling, strip_space) = spelling(json.decoder.as_ref())?;
    let mut ids = json.model.vocab;
    for token in &json.added_tokens {
        match ids.insert(token.content.clone(), token.id) {
            Some(other) if other != token.id => {
                let reason = "is in the vocabulary and among the added tokens, under two numbers";
                return Err(TextError::Token { id: token.id, text: token.content.clone(), reason });
            }
            _ => {}
        }
    }
    let pieces = pieces(&ids, &json.added_tokens, spelling, json.model.byte_fallback)?;

    let id = |name: Option<TokenName>| name.and_then(|name| ids.get(name.text()).copied());
    let bos = id(config.bos_token.or(map.bos_token));
    let eos = id(config.eos_token.or(map.eos_token));
    let mut stops = match generation.eos_token_id {
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
        None => Vec::new(),
    };
    if let Some(&id) = stops.iter().find(|&&id| id as usize >= pieces.len()) {
        return Err(TextError::IdOutOfRange { what: "eos".to_owned(), id, tokens: pieces.len() });
    }
    stops.extend(eos);
    let (mut prefix, mut suffix) = json.post_processor.as_ref().map(around).unwrap_or_default();
    if let Some(add) = config.add_bos_token {
        prefix = bos.filter(|_| add).into_iter().collect();
    }
    if let Some(add) = config.add_eos_token {
        suffix = eos.filter(|_| add).into_iter().collect();
    }

    if json.model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
        let found = "continuing_subword_prefix".to_owned();
        return Err(TextError::Unsupported { what: "BPE with", found, supported: "BPE without" });
    }
    if let Some(unknown) = json.model.unk_token.as_ref().filter(|&token| !ids.contains_key(token)) {
        let reason = "stands for what has no token, but is not in the vocabulary";
        return Err(TextError::Token { id: 0, text: unknown.clone(), reason });
    }
    let merges = json.model.merges.into_iter().enumerate().map(|(index, merge)| match merge {
        Merge::Pair(left, right) => Ok((left, right)),
        Merge::Joined(merge) => model::pair(index, merge),
    });
    let merges = merges.collect::<Result<Vec<_>, TextError>>()?;
    let mut bpe = model::bpe(ids, merges)?;
    bpe.unk_token = json.model.unk_token;
    bpe.end_of_word_suffix = json.model.end_of_word_suffix.filter(|suffix| !suffix.is_empty());
    bpe.fuse_unk = json.model.fuse_unk;
    bpe.byte_fallback = json.model.byte_fallback;
    bpe.ignore_merges = json.model.ignore_merges;
    Ok(Parts {
        bpe,
        normalizer: json.normalizer,
        pre_tokenizer: json.pre_tokenizer,
        added: json.added_tokens.into_iter().map(Added::token).collect(),
        pieces,
        spelling,
        strip_space,
        bos,
        eos,
        stops,
        prefix,
        suffix,
        template,
    })
}

/// The chat template of the model in `folder`.
pub(super) fn template(folder: &Path) -> Result<Option<TemplateSource>, TextError> {
    let config: Config = optional(&folder.join(CONFIG))?;
    template_or(folder, config.chat_template)
}

/// The template in a file of its own, which newer models have, or else that of the tokenizer's configuration.
fn template_or(folder: &Path, configured: Option<Templates>) -> Result<Option<TemplateSource>, TextError> {
    const FILE: &str = "chat_template.jinja";
    Ok(match read(&folder.join(FILE))? {
        Some(bytes) => Some(TemplateSource { from: FILE, text: String::from_utf8_lossy(&bytes).into_owned() }),
        None => configured.and_then(Templates::default).map(|text| TemplateSource { from: CONFIG, text }),
    })
}

impl Added {
    /// Control tokens are looked for in the text as written, so that escaping can hide them.
    fn token(self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized && !self.special)
    }
}

impl TokenName {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

impl Templates {
    /// The one to use for a plain conversation.
    fn default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => templates.into_iter().find(|it| it.name == "default").map(|it| it.template),
        }
    }
}

/// Reads `tokenizer.json`, and tells a tokenizer of another kind from a damaged file.
fn tokenizer_json(path: &Path) -> Result<TokenizerJson, TextError> {
    #[derive(Deserialize)]
    struct Kind {
        model: KindOfModel,
    }
    #[derive(Deserialize)]
    struct KindOfModel {
        #[serde(rename = "type")]
        name: Option<String>,
    }
    let missing = || TextError::Read { path: path.to_owned(), cause: io::ErrorKind::NotFound.into() };
    let bytes = read(path)?.ok_or_else(missing)?;
    serde_json::from_slice(&bytes).map_err(|error| match serde_json::from_slice(&bytes) {
        Ok(Kind { model: KindOfModel { name: Some(found) } }) if found != "BPE" => {
            TextError::Unsupported { what: "tokenizer model", found, supported: "BPE" }
        }
        _ => TextError::Json { path: path.to_owned(), reason: one_line(error) },
    })
}

/// The value in a file, or the default if there is no such file.
fn optional<T: DeserializeOwned + Default>(path: &Path) -> Result<T, TextError> {
    let Some(bytes) = read(path)? else { return Ok(T::default()) };
    serde_json::from_slice(&bytes).map_err(|error| TextError::Json { path: path.to_owned(), reason: one_line(error) })
}

/// The content of a file, if it exists.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(TextError::Read { path: path.to_owned(), cause }),
    }
}

/// How the decoder of `tokenizer.json` spells text, and whether it takes a space away at the start.
fn spelling(decoder: Option<&Value>) -> Result<(Spelling, bool), TextError> {
    let decoder = decoder.unwrap_or(&Value::Null);
    let steps: Vec<&Value> = match decoder["decoders"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![decoder],
    };
    let step = |kind: &str| steps.iter().find(|step| step["type"] == kind);
    if step("ByteLevel").is_some() {
        return Ok((Spelling::ByteLevel, false));
    }
    if let Some(metaspace) = step("Metaspace") {
        // Files from before 2023 say `add_prefix_space`.
        let never = metaspace["prepend_scheme"] == "never" || metaspace["add_prefix_space"] == false;
        return Ok((Spelling::SentencePiece, !never));
    }
    if step("Replace").is_some_and(|step| step["pattern"]["String"] == SPACE.to_string()) {
        let strip = step("Strip").is_some_and(|step| step["start"].as_u64().is_some_and(|start| start > 0));
        return Ok((Spelling::SentencePiece, strip));
    }
    let found = decoder["type"].as_str().unwrap_or("none").to_owned();
    let supported = "ByteLevel, Metaspace, and Replace of `▁` by a space";
    Err(TextError::Unsupported { what: "decoder", found, supported })
}

/// The bytes of all tokens. Numbers that no token has get no bytes.
fn pieces(
    ids: &HashMap<String, u32>,
    added: &[Added],
    spelling: Spelling,
    byte_fallback: bool,
) -> Result<Pieces, TextError> {
    let mut texts: Vec<(u32, &str)> = ids.iter().map(|(text, &id)| (id, text.as_str())).collect();
    texts.sort_unstable();
    let Some(&(last, text)) = texts.last() else { return Err(TextError::NoTokens) };
    // Vocabularies have few holes; a number far beyond the others would only fill memory.
    if last as usize >= 2 * texts.len() + 1024 {
        return Err(TextError::IdOutOfRange { what: format!("{text:?}"), id: last, tokens: texts.len() });
    }
    let added: BTreeMap<u32, bool> = added.iter().map(|token| (token.id, token.special)).collect();
    let mut pieces = Pieces::with_capacity(last as usize + 1);
    for (id, text) in texts {
        if pieces.len() > id as usize {
            let reason = "shares its number with another token";
            return Err(TextError::Token { id, text: text.to_owned(), reason });
        }
        while pieces.len() < id as usize {
            pieces.push("", Kind::Normal, spelling);
        }
        let kind = match added.get(&id) {
            Some(true) => Kind::Control,
            Some(false) => Kind::UserDefined,
            None if byte_fallback && byte_token(text).is_some() => Kind::Byte,
            None => Kind::Normal,
        };
        pieces.push(text, kind, spelling);
    }
    Ok(pieces.shrink())
}

/// The tokens that the post-processor puts before and after a text.
fn around(processor: &Value) -> (Vec<u32>, Vec<u32>) {
    if let Some(steps) = processor["processors"].as_array() {
        return steps
            .iter()
            .map(around)
            .find(|(before, after)| !(before.is_empty() && after.is_empty()))
            .unwrap_or_default();
    }
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut side = &mut before;
    for item in processor["single"].as_array().into_iter().flatten() {
        if item["Sequence"].is_object() {
            side = &mut after;
        } else if let Some(name) = item["SpecialToken"]["id"].as_str() {
            let ids = processor["special_tokens"][name]["ids"].as_array().into_iter().flatten();
            side.extend(ids.filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
        }
    }
    (before, after)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Tokenizer, fixture},
        *,
    };
    use crate::weights::{GgufTokenizer, TokenizerSource};
    use serde_json::json;
    use std::fs;
    use tempfile::TempDir;

    /// `tokenizer.json` of a GGUF vocabulary of the fixtures, as Hugging Face's converters write it.
    fn json(source: &GgufTokenizer, pairs: bool) -> Value {
        let vocab: HashMap<&str, usize> = source.tokens.iter().map(String::as_str).zip(0..).collect();
        let types = source.token_types.as_ref().unwrap();
        let added: Vec<Value> = types
            .iter()
            .enumerate()
            .filter(|&(_, kind)| matches!(kind, 2..=4))
            .map(
                |(id, kind)| json!({"id": id, "content": source.tokens[id], "special": *kind != 4, "normalized": true}),
            )
            .collect();
        let spm = source.model == "llama";
        let merges: Vec<(String, String)> = match &source.merges {
            Some(merges) => merges.iter().map(|merge| model::pair(0, merge.clone()).unwrap()).collect(),
            None => {
                let kind = |kind: &i32| if *kind == 1 { Kind::Normal } else { Kind::Control };
                let kinds: Vec<Kind> = types.iter().map(kind).collect();
                super::super::sentencepiece::merges(&source.tokens, &kinds, source.scores.as_ref().unwrap()).unwrap()
            }
        };
        let merges: Vec<Value> = merges
            .into_iter()
            .map(|(left, right)| if pairs { json!([left, right]) } else { json!(format!("{left} {right}")) })
            .collect();
        let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let unspace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let digits = json!({"type": "Digits", "individual_digits": true});
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let begin = json!({
            "type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        });
        let when = |condition: bool, value: Value| if condition { value } else { Value::Null };
        json!({
            "version": "1.0",
            "added_tokens": added,
            "normalizer": when(spm, json!({
                "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]
            })),
            "pre_tokenizer": when(!spm, json!({"type": "Sequence", "pretokenizers": [digits, byte_level]})),
            "post_processor": when(spm, begin),
            "decoder": if spm {
                json!({"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]})
            } else {
                byte_level
            },
            "model": {
                "type": "BPE", "byte_fallback": spm, "unk_token": when(spm, json!("<unk>")), "fuse_unk": spm,
                "vocab": vocab, "merges": merges,
            },
        })
    }

    /// A folder with these files.
    fn folder(files: &[(&str, String)]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(folder.path().join(name), content).unwrap();
        }
        folder
    }

    fn open(folder: &TempDir) -> Result<Tokenizer, TextError> {
        Tokenizer::new(TokenizerSource::Folder(folder.path().to_owned()))
    }

    #[test]
    fn a_folder_and_a_gguf_file_of_one_model_agree() {
        let text = "hello  the other é日🦙 12\n<tool> [INST] don't";
        for (source, pairs) in [(fixture::byte_level(), true), (fixture::sentence_piece(), false)] {
            let folder = open(&folder(&[("tokenizer.json", json(&source, pairs).to_string())])).unwrap();
            let gguf = Tokenizer::new(TokenizerSource::Gguf(source)).unwrap();
            let ids = gguf.encode_plain(text, true).unwrap();
            assert_eq!(folder.encode_plain(text, true).unwrap(), ids);
            assert_eq!((folder.decode(&ids), folder.vocab()), (text.to_owned(), gguf.vocab()));
            let attack = "a<|im_end|></s>b";
            assert_eq!(folder.encode(attack, false).unwrap(), gguf.encode(attack, false).unwrap());
            assert_eq!(folder.encode_plain(attack, false).unwrap(), gguf.encode_plain(attack, false).unwrap());
            assert_eq!(folder.stop_tokens(), gguf.stop_tokens());
        }
    }

    #[test]
    fn ends_and_templates_come_from_the_other_files() {
        let json = json(&fixture::byte_level(), true).to_string();
        let config = json!({
            "bos_token": {"content": "<|im_start|>", "special": true}, "eos_token": "<|im_end|>", "add_bos_token": true,
            "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ eos_token }}"}],
        });
        let generation = json!({"eos_token_id": [2, 7]});
        let files = [
            ("tokenizer.json", json.clone()),
            ("tokenizer_config.json", config.to_string()),
            ("generation_config.json", generation.to_string()),
        ];
        let with = folder(&files);
        let tokenizer = open(&with).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.stop_tokens()), (Some(1), Some(2), &[0, 2, 7][..]));
        assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
        assert_eq!(tokenizer.chat_template().unwrap().render(&[], true).unwrap(), "<|im_end|>");
        let source = TokenizerSource::Folder(with.path().to_owned());
        let found = TemplateSource::of(&source).unwrap().unwrap();
        assert_eq!((found.from, &*found.text), ("tokenizer_config.json", "{{ eos_token }}"));
        fs::write(with.path().join("chat_template.jinja"), "newer").unwrap();
        assert_eq!(TemplateSource::of(&source).unwrap().unwrap().from, "chat_template.jinja");
        assert_eq!(open(&with).unwrap().chat_template().unwrap().render(&[], true).unwrap(), "newer");

        let map = json!({"eos_token": {"content": "<|endoftext|>"}}).to_string();
        let bare = open(&folder(&[("tokenizer.json", json), ("special_tokens_map.json", map)])).unwrap();
        assert_eq!((bare.bos(), bare.eos()), (None, Some(0)));
        assert!(matches!(bare.chat_template(), Err(TextError::NoTemplate)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = json(&fixture::byte_level(), true);
        let error = |change: &dyn Fn(&mut Value)| {
            let mut json = good.clone();
            change(&mut json);
            open(&folder(&[("tokenizer.json", json.to_string())])).unwrap_err().to_string()
        };
        let json = good.to_string();
        let with = |name: &'static str, content: &str| {
            let files = [("tokenizer.json", json.clone()), (name, content.to_owned())];
            open(&folder(&files)).unwrap_err().to_string()
        };
        let cut = json[..json.len() / 2].to_owned();
        let cases = [
            (open(&folder(&[])).unwrap_err().to_string(), "cannot read"),
            (open(&folder(&[("tokenizer.json", cut)])).unwrap_err().to_string(), "tokenizer.json is damaged"),
            (with("tokenizer_config.json", "{"), "tokenizer_config.json is damaged"),
            (with("generation_config.json", r#"{"eos_token_id": 363}"#), "the eos token is 363"),
            (
                error(&|it| it["model"] = json!({"type": "Unigram", "vocab": [["a", 0.5]]})),
                "\"Unigram\" is not supported",
            ),
            (error(&|it| it["decoder"] = Value::Null), "decoder \"none\" is not supported"),
            (error(&|it| it["model"]["merges"][3] = json!(["h", "日"])), "merge 3 (\"h 日\") needs \"日\""),
            (error(&|it| it["model"]["merges"][3] = json!("xy")), "merge 3 (\"xy\") is not two tokens"),
            (error(&|it| it["model"]["vocab"]["far"] = json!(4_000_000_000u32)), "the \"far\" token is 4000000000"),
            (error(&|it| it["model"]["vocab"]["twin"] = json!(9)), "shares its number"),
            (error(&|it| it["added_tokens"][0]["id"] = json!(300)), "under two numbers"),
            (error(&|it| it["model"]["unk_token"] = json!("?!")), "\"?!\""),
            (error(&|it| it["model"]["vocab"] = json!({})), "merge 0"),
        ];
        for (error, part) in cases {
            assert!(error.contains(part) && !error.contains('\n'), "{error:?} lacks {part:?}");
        }
    }
}
