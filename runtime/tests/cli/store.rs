//! The store as the commands use it: what fails leaves nothing under a final name.

use super::{
    command::{run, thinkey},
    fixture,
    server::hub,
};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};

const MODEL: &str = "owner/tiny";

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files anywhere under `folder`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// The tiny model; it lives as long as the process, as the server does.
fn model() -> &'static [u8] {
    fixture::gguf(&fixture::config(128)).to_bytes().leak()
}

#[test]
fn a_pulled_model_answers() {
    let home = tempfile::tempdir().unwrap();
    let model = model();
    let url = hub(model, &sha256(model), model.len());
    let pulled = run(thinkey(home.path()).env("HF_ENDPOINT", &url).args(["pull", MODEL]), "").ok();
    assert_eq!(fs::read(pulled.trim_end()).unwrap(), model);
    // It is there now, so no hub is needed.
    let answer = run(thinkey(home.path()).args(["generate", "hi", "--max-tokens", "5", "--model", MODEL]), "").ok();
    assert_eq!(answer.trim_end_matches('\n').len(), 5);
}

#[test]
fn a_wrong_checksum_names_both_and_leaves_nothing() {
    let home = tempfile::tempdir().unwrap();
    let (model, announced) = (model(), "0".repeat(64));
    let url = hub(model, &announced, model.len());
    let error = run(thinkey(home.path()).env("HF_ENDPOINT", &url).args(["pull", MODEL]), "").error();
    assert!(error.contains(&announced) && error.contains(&sha256(model)), "{error}");
    let left: Vec<_> = files(&home.path().join("models"));
    assert!(left.is_empty(), "{left:?}");
    let missing = run(thinkey(home.path()).args(["inspect", MODEL]), "").error();
    assert!(missing.contains("run `thinkey pull owner/tiny`"), "{missing}");
}

#[test]
fn a_store_that_cannot_be_written_names_itself() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "a file, no folder").unwrap();
    let model = model();
    let url = hub(model, &sha256(model), model.len());
    // Below a file there is no folder, not even for root.
    for command in [&["pull", MODEL][..], &["generate", "hi", "--model", MODEL], &["chat", "--model", MODEL]] {
        let error = run(thinkey(&file.join("store")).env("HF_ENDPOINT", &url).args(command), "").error();
        assert!(error.starts_with("cannot") && error.contains(file.to_str().unwrap()), "{error}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "a file, no folder");
}

/// A device that is always full stands for a full disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_the_pull_and_leaves_nothing_under_the_name() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("models/owner--tiny");
    fs::create_dir_all(&folder).unwrap();
    std::os::unix::fs::symlink("/dev/full", folder.join("tiny.gguf.part")).unwrap();
    let model = model();
    let url = hub(model, &sha256(model), model.len());
    let error = run(thinkey(home.path()).env("HF_ENDPOINT", &url).args(["pull", MODEL]), "").error();
    assert!(error.starts_with("no space left on ") && error.contains("THINKEY_HOME"), "{error}");
    assert!(!folder.join("tiny.gguf").exists() && !folder.join("thinkey.json").exists());
}

#[test]
fn a_hub_that_cannot_be_reached_is_named() {
    let home = tempfile::tempdir().unwrap();
    let error = run(thinkey(home.path()).args(["pull", MODEL]), "").error();
    assert!(error.contains("http://127.0.0.1:9 cannot be reached") && error.contains("HF_ENDPOINT"), "{error}");
    assert!(files(&home.path().join("models")).is_empty());
    let error = run(thinkey(home.path()).args(["pull", "no such/name"]), "").error();
    assert!(error.contains("is not a hub name"), "{error}");
}
