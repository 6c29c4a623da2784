//! `thinkey chat`, its lines coming from a pipe.

use super::{
    command::{Run, run, thinkey},
    fixture::{self, AROUND, ASK, count},
};
use std::fs;

fn chat(arguments: &[&str], input: &str) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    fs::write(&model, fixture::gguf(&fixture::config(512)).to_bytes()).unwrap();
    run(thinkey(folder.path()).arg("chat").arg("--model").arg(&model).args(arguments), input)
}

/// Tokens that the first question costs.
fn first(question: &str) -> usize {
    AROUND + count("user") + count(question) + ASK
}

/// How lines of the statistics start that are the same for every answer.
const APART: [&str; 2] = ["policy: ", "process: "];

/// Tokens that another question costs: also the token of the reply that nothing was computed after, and the end of the
/// reply's message.
fn next(question: &str) -> usize {
    1 + 2 + first(question)
}

#[test]
fn turns_are_appended_and_commands_are_followed() {
    let run = chat(
        &["--max-tokens", "8"],
        "/stats\nhi\n/stats\nthere\r\n/stats\n/help\n/frob\n\n/reset\n/stats\nhi\n/quit\nno\n",
    );
    assert_eq!(run.stderr.lines().filter(|line| line.contains("cut off after 8 tokens")).count(), 3);
    assert!(run.stderr.contains("there is no /frob; /help lists the commands\n"), "{run:?}");
    let stdout = run.ok();
    let lines: Vec<&str> = stdout.lines().filter(|line| !APART.iter().any(|start| line.starts_with(start))).collect();
    let begins = |at: usize, text: &str| assert!(lines[at].starts_with(text), "line {at} of {lines:#?}");
    begins(0, "no answer yet; the cache is planned for 512 tokens");
    let hi = lines[1];
    begins(2, &format!("{} prompt tokens at ", first("hi")));
    begins(3, &format!("cache for 512 tokens, {} used: ", first("hi") + 7));
    let there = lines[4];
    begins(5, &format!("{} prompt tokens at ", next("there")));
    begins(6, &format!("cache for 512 tokens, {} used: ", first("hi") + 7 + next("there") + 7));
    begins(7, "/help ");
    let after = lines.iter().position(|line| line.starts_with("Ctrl-C ends an answer")).unwrap() + 1;
    begins(after, "no answer yet");
    assert_eq!(lines[after + 1], hi, "after /reset the same question has the same answer");
    assert_eq!(lines.len(), after + 2, "nothing after /quit: {lines:#?}");
    assert!(hi.len() == 8 && there.len() == 8, "{hi:?} {there:?}");
}

/// What a chat answers to its second question is what it answers where it reads the whole conversation at once.
#[test]
fn an_appended_turn_is_answered_as_the_whole_conversation() {
    let whole = ["--lambda", "0", "--kv-type", "f32", "--max-tokens", "12"];
    let appended = chat(&whole, "hi\nthere\n").ok();
    let [hi, there] = appended.lines().collect::<Vec<_>>()[..] else { panic!("{appended}") };
    // A template that rewrites the conversation, to the same text, as it cannot tell: it puts it into one message.
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("whole.jinja");
    let text = format!(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{hi}<|im_end|>\n<|im_start|>user\nthere<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    fs::write(&template, format!("{{{{ {} }}}}", serde_json::json!(text))).unwrap();
    let arguments = [&whole[..], &["--chat-template", template.to_str().unwrap(), "--stats"]].concat();
    let at_once = chat(&arguments, "anything\n").ok();
    assert_eq!(at_once.lines().next(), Some(there));
    assert!(at_once.contains(&format!("{} prompt tokens", first("hi") + 11 + next("there"))), "{at_once}");
}

#[test]
fn a_system_message_is_read_with_the_first_question_and_survives_a_reset() {
    let run = chat(&["--system", "Be kind.", "--max-tokens", "1", "--stats"], "hi\nagain\n/reset\nhi");
    let stdout = run.ok();
    let read: Vec<&str> = stdout.lines().filter_map(|line| line.split_once(" prompt tokens").map(|it| it.0)).collect();
    let system = AROUND + count("systemBe kind.");
    let expected = [system + first("hi"), next("again"), system + first("hi")];
    assert_eq!(read, expected.map(|tokens| tokens.to_string()));
}

#[test]
fn a_full_context_is_told_with_its_numbers_and_the_chat_goes_on() {
    let run = chat(&["--context", "64", "--max-tokens", "8"], "hi\nthere\nand then\n/reset\nhi\n/stats\n");
    let taken = first("hi") + 8 + next("there") - 1 + 8;
    assert!(taken <= 64 && taken + next("and then") - 1 > 64);
    let says = format!(
        "the context is full: of 64 tokens {taken} are taken and this question needs {}; /reset starts anew",
        next("and then") - 1
    );
    assert!(run.stderr.contains(&says), "{run:?}\n{says}");
    let stdout = run.ok();
    let lines: Vec<&str> = stdout.lines().filter(|line| !APART.iter().any(|start| line.starts_with(start))).collect();
    assert_eq!(lines.len(), 5, "two answers, one after the reset, and its stats: {lines:#?}");
    assert_eq!(lines[2], lines[0]);

    let run = chat(&["--context", "25", "--max-tokens", "200"], "hi\n/stats\n");
    assert!(run.stderr.contains("cut off: the context of 25 tokens is full; /reset starts anew"), "{run:?}");
    assert!(run.ok().contains("cache for 25 tokens, 25 used"));
    let run = chat(&["--context", "10"], "hi\n");
    assert!(run.stderr.contains("of 10 tokens 0 are taken"), "{run:?}");
    assert_eq!(run.ok(), "");
}

#[test]
fn a_template_that_is_missing_or_bad_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("tiny.gguf");
    let mut file = fixture::gguf_without_tokenizer(&fixture::config(512));
    fixture::set_tokenizer(&mut file);
    fs::write(&model, file.to_bytes()).unwrap();
    let mut chat = thinkey(folder.path());
    let error = run(chat.args(["chat", "--max-tokens", "3", "--model"]).arg(&model), "hi\n").error();
    assert!(error.contains("no chat template") && error.contains("--chat-template"), "{error}");

    let template = folder.path().join("template.jinja");
    fs::write(&template, "{% if %}").unwrap();
    chat.arg("--chat-template").arg(&template);
    let error = run(&mut chat, "hi\n").error();
    assert!(error.starts_with("line 1 of the chat template: "), "{error}");
    fs::write(&template, fixture::TEMPLATE).unwrap();
    assert_eq!(run(&mut chat, "hi\n").ok().trim_end_matches('\n').len(), 3);
}
