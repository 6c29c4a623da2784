//! `thinkey` without a command, on the default model; it is fetched if it is not in the store.

use std::process::Command;

#[test]
fn the_default_model_answers_a_question_about_a_long_text() {
    let output = Command::new(env!("CARGO_BIN_EXE_thinkey")).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    let [about, "", answer, "", speed, policy, cache, ..] = stdout.lines().collect::<Vec<_>>()[..] else {
        panic!("{stdout}")
    };
    let tokens = |line: &str| line.split([' ', '(']).find_map(|word| word.parse::<usize>().ok()).unwrap();
    assert!(tokens(about) > 3000 && tokens(speed) == tokens(about), "{stdout}");
    assert!(answer.contains("pig"), "{stdout}");
    assert_eq!(policy, "policy: balanced");
    let bytes = |name| cache.split_once(name).unwrap().1.split([',', ';']).next().unwrap();
    assert_eq!(bytes("planned "), bytes("measured "));
    assert_ne!(bytes("whole "), bytes("measured "));
}
