//! What a hub repository holds, and which of its files make up a model.

use serde::Deserialize;

use super::error::StoreError;

/// The hub's description of a repository at one commit (`/api/models/…/revision/…?blobs=true`).
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    /// The commit.
    pub sha: String,
    #[serde(default)]
    siblings: Vec<HubFile>,
}

/// A file of a repository.
#[derive(Debug, Deserialize)]
pub(super) struct HubFile {
    /// Path in the repository.
    #[serde(rename = "rfilename")]
    pub path: String,
    /// Length in bytes.
    pub size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: String,
}

impl HubFile {
    /// SHA-256 in hexadecimal. Only large files have one; for small ones git's own object name is announced, which says
    /// nothing that their length and TLS do not.
    pub fn sha256(&self) -> Option<String> {
        self.lfs.as_ref().map(|lfs| lfs.sha256.to_ascii_lowercase())
    }
}

impl Listing {
    /// The files that make up the model: the one that is named; else, where the repository holds a `config.json` and
    /// safetensors, those with the tokenizer; else its only GGUF file. `repo` names the repository in messages.
    pub fn choose(&self, repo: &str, file: Option<&str>) -> Result<Vec<&HubFile>, StoreError> {
        if let Some(wanted) = file {
            let found = self.siblings.iter().find(|file| file.path == wanted);
            return found.map(|file| vec![file]).ok_or_else(|| self.missing(repo, wanted));
        }
        let folder: Vec<&HubFile> = self.siblings.iter().filter(|file| belongs_to_model(&file.path)).collect();
        let has = |test: fn(&str) -> bool| folder.iter().any(|file| test(&file.path));
        if has(|path| path == "config.json") && has(|path| path.ends_with(".safetensors")) {
            return Ok(folder);
        }
        let gguf: Vec<&HubFile> = self.siblings.iter().filter(|file| file.path.ends_with(".gguf")).collect();
        match gguf[..] {
            [] => Err(self.missing(repo, "config.json with model.safetensors, or *.gguf")),
            [_] => Ok(gguf),
            [first, ..] => Err(StoreError::Ambiguous {
                repo: repo.to_owned(),
                first: first.path.clone(),
                present: names(gguf.iter().copied()),
            }),
        }
    }

    fn missing(&self, repo: &str, file: &str) -> StoreError {
        let weights = |file: &&HubFile| file.path.ends_with(".gguf") || file.path.ends_with(".safetensors");
        let present = names(self.siblings.iter().filter(weights));
        let present = if present.is_empty() { "neither GGUF files nor safetensors".to_owned() } else { present };
        StoreError::NoSuchFile { repo: repo.to_owned(), file: file.to_owned(), present }
    }
}

fn names<'a>(files: impl Iterator<Item = &'a HubFile>) -> String {
    files.map(|file| file.path.as_str()).collect::<Vec<_>>().join(", ")
}

/// Whether a file in the root of a repository is part of the model: some repositories also hold the same weights in the
/// form of other frameworks (`consolidated.safetensors`, ONNX).
fn belongs_to_model(path: &str) -> bool {
    const SMALL: [&str; 12] = [
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ];
    let shard = |rest: &str| rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    let weights = path.strip_prefix("model").and_then(|rest| rest.strip_suffix(".safetensors"));
    SMALL.contains(&path) || weights.is_some_and(shard)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(files: &[&str]) -> Listing {
        let siblings: Vec<_> = files.iter().map(|file| serde_json::json!({ "rfilename": file })).collect();
        serde_json::from_value(serde_json::json!({ "sha": "c0ffee", "siblings": siblings })).unwrap()
    }

    fn chosen(files: &[&str], file: Option<&str>) -> Result<Vec<String>, StoreError> {
        Ok(listing(files).choose("a/b", file)?.iter().map(|file| file.path.clone()).collect())
    }

    #[test]
    fn a_folder_is_weights_config_and_tokenizer() {
        let repo = [
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "runs/model.safetensors",
            "tokenizer.json",
        ];
        assert_eq!(
            chosen(&repo, None).unwrap(),
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json"
            ]
        );
    }

    #[test]
    fn one_of_several_gguf_files_must_be_named() {
        let repo = ["config.json", "x-q4.gguf", "x-q8.gguf"];
        let error = chosen(&repo, None).unwrap_err();
        assert!(error.to_string().contains("a/b:x-q4.gguf (there are x-q4.gguf, x-q8.gguf)"), "{error}");
        assert_eq!(chosen(&repo, Some("x-q8.gguf")).unwrap(), ["x-q8.gguf"]);
        assert_eq!(chosen(&repo[..2], None).unwrap(), ["x-q4.gguf"]);
    }

    #[test]
    fn a_missing_file_names_what_is_there() {
        let error = chosen(&["README.md", "x-q4.gguf"], Some("x-q5.gguf")).unwrap_err();
        assert_eq!(error.to_string(), "a/b has no file x-q5.gguf; it has x-q4.gguf");
        assert!(matches!(chosen(&["README.md"], None), Err(StoreError::NoSuchFile { .. })));
    }

    #[test]
    fn reads_the_hubs_json() {
        let text = r#"{"_id": "1", "sha": "c0ffee", "private": false, "siblings": [
            {"rfilename": "a.gguf", "size": 3, "blobId": "b", "lfs": {"sha256": "AB", "size": 3, "pointerSize": 130}},
            {"rfilename": "README.md", "size": 5, "blobId": "b"}]}"#;
        let listing: Listing = serde_json::from_str(text).unwrap();
        assert_eq!(listing.siblings[0].sha256().as_deref(), Some("ab"));
        assert_eq!(listing.siblings[1].sha256(), None);
    }
}
