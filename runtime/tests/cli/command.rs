//! Running the built binary, away from the store and the network of this machine.

use std::{
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

/// What a run printed.
#[derive(Clone, Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// A `thinkey` whose store is `home` and that finds neither `pip` nor a proxy.
pub fn thinkey(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thinkey"));
    for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "ALL_PROXY", "HTTP_PROXY", "all_proxy", "http_proxy"] {
        command.env_remove(name);
    }
    command.env("THINKEY_HOME", home).env("HF_HOME", home).env("HF_ENDPOINT", "http://127.0.0.1:9").env("PATH", "");
    command
}

/// Runs it with `input` on standard input.
pub fn run(command: &mut Command, input: &str) -> Run {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it is built");
    // One that ends before it has read everything is judged by what it printed.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    child.wait_with_output().expect("it ends").into()
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            // A program that a signal ended has no code.
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).expect("UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }
}

impl Run {
    /// What it printed, if it went well.
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }

    /// The one line that says why it failed; nothing else was printed.
    pub fn error(self) -> String {
        assert_eq!(self.code, 1, "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
        let line = self.stderr.strip_prefix("thinkey: ").unwrap_or_else(|| panic!("{self:?}"));
        let line = line.strip_suffix('\n').unwrap_or_else(|| panic!("{self:?}"));
        assert!(!line.is_empty() && !line.contains('\n'), "{self:?}");
        line.to_owned()
    }
}
