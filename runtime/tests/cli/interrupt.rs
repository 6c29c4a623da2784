//! Ctrl-C.

use super::{
    command::{Run, thinkey},
    fixture,
};
use std::{
    fs,
    io::{Read, Write},
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// Starts a command on a model that writes for minutes if it is let.
fn start(arguments: &[&str]) -> (Child, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    fs::write(&model, fixture::gguf(&fixture::config(200_000)).to_bytes()).unwrap();
    let child = thinkey(folder.path())
        .args(arguments)
        .args(["--context", "190000", "--max-tokens", "180000", "--threads", "1", "--model"])
        .arg(&model)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (child, folder)
}

/// Waits for the answer to begin, and presses Ctrl-C; what came before is the first byte.
fn interrupt(child: &mut Child) -> u8 {
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    first[0]
}

#[test]
fn it_ends_the_answer_of_generate_which_still_prints_stats() {
    let (mut child, _folder) = start(&["generate", "hi", "--stats"]);
    interrupt(&mut child);
    let run = Run::from(child.wait_with_output().unwrap());
    assert_eq!(run.code, 130, "{run:?}");
    assert_eq!(run.stderr, "thinkey: interrupted\n");
    assert!(run.stdout.contains(" prompt tokens at ") && run.stdout.contains("cache for 190000 tokens"), "{run:?}");
}

#[test]
fn it_ends_the_answer_and_not_the_chat() {
    let (mut child, _folder) = start(&["chat"]);
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"hi\n").unwrap();
    interrupt(&mut child);
    // What goes on is the conversation: the second answer is interrupted too.
    input.write_all(b"and then\n/stats\n").unwrap();
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    interrupt(&mut child);
    drop(input);
    let run = Run::from(child.wait_with_output().unwrap());
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.stderr, "thinkey: interrupted\nthinkey: interrupted\n");
    assert!(run.stdout.contains("cache for 190000 tokens"), "{run:?}");
}

/// At the prompt there is nothing to end but the chat.
#[test]
fn it_ends_a_chat_that_waits_for_a_line_from_a_pipe() {
    let (mut child, _folder) = start(&["chat"]);
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"/stats\n").unwrap();
    interrupt(&mut child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    drop(input);
}
