//! Scenario files.

use super::{SimError, Time, Weather};
use serde::Deserialize;
use std::{
    fs,
    path::{Path, PathBuf},
};
use thinkey::plan::Size;
use thinkey_core::trace::TraceReader;

/// What a scenario file says.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it is called.
    pub name: String,
    /// What everything random is drawn from.
    #[serde(default)]
    pub seed: u64,
    /// A shipped board, or a profile's file.
    pub board: String,
    /// A shipped model shape, a shape's file, or a model's: a GGUF file or a folder.
    pub model: String,
    /// Cache policies, each of which the whole script is run under.
    pub policies: Vec<String>,
    /// Tokens that a sequence has room for.
    pub context: usize,
    /// Newest tokens kept whole, R.
    #[serde(default = "recent")]
    pub recent: usize,
    /// Newest queries of a prompt that score channels, W.
    #[serde(default = "window")]
    pub window: usize,
    /// Threads that compute.
    #[serde(default = "threads")]
    pub threads: usize,
    /// What is asked, in this order.
    #[serde(default)]
    pub request: Vec<Request>,
    /// When other programs take memory.
    #[serde(default)]
    pub shrink: Vec<Shrink>,
    /// When power is cut.
    #[serde(default)]
    pub cut: Vec<Cut>,
    /// What goes wrong on the line between host and device; without it requests come from within.
    #[serde(default)]
    pub link: Option<Weather>,
    /// What has to come out.
    #[serde(default)]
    pub expect: Vec<Expect>,
}

const fn recent() -> usize {
    thinkey::model::transformer::RECENT
}

const fn window() -> usize {
    thinkey::model::transformer::WINDOW
}

const fn threads() -> usize {
    6
}

/// A completion that is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// When, at the earliest.
    #[serde(default)]
    pub at: Time,
    /// A recorded trace, beside the scenario, whose prompt and steps this is: where prompt and answer are as long as they were.
    #[serde(default)]
    pub trace: Option<PathBuf>,
    /// Tokens of the prompt, where no trace says.
    #[serde(default)]
    pub prompt: usize,
    /// Tokens of the answer, where no trace says.
    #[serde(default)]
    pub tokens: usize,
    /// After how many tokens the asker has enough.
    #[serde(default)]
    pub cancel: Option<usize>,
}

/// Memory that is gone from some time on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shrink {
    /// When.
    pub at: Time,
    /// How much.
    pub by: Size,
}

/// A loss of power: the request under way is asked again once the board is up.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cut {
    /// When.
    pub at: Time,
    /// How long it takes until the model is loaded again.
    pub down: Time,
}

/// What has to come out under one policy, or all.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// The policy; all where none is given.
    #[serde(default)]
    pub policy: Option<String>,
    /// Whether weights, cache and buffers fit what the system leaves.
    #[serde(default)]
    pub fits: Option<bool>,
    /// Most bytes of the cache.
    #[serde(default)]
    pub cache: Option<Size>,
    /// Tokens of all answers together, at least.
    #[serde(default)]
    pub tokens: Option<usize>,
    /// Longest time to a first token.
    #[serde(default)]
    pub first: Option<Time>,
    /// Longest time of a token after it.
    #[serde(default)]
    pub step: Option<Time>,
    /// When all is said over the link, at the latest.
    #[serde(default)]
    pub over: Option<Time>,
    /// Most limits broken.
    #[serde(default)]
    pub broken: Option<usize>,
}

impl Scenario {
    /// Reads a scenario file.
    ///
    /// # Errors
    /// [`SimError`] where it cannot be read, or says what cannot be.
    pub fn read(path: &Path) -> Result<Self, SimError> {
        let text = fs::read_to_string(path).map_err(|cause| SimError::Read { path: path.to_owned(), cause })?;
        Self::parse(&text, path)
    }

    /// Parses what is in the file `path`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(text: &str, path: &Path) -> Result<Self, SimError> {
        let mut scenario: Self =
            toml::from_str(text).map_err(|cause| SimError::Toml { path: path.to_owned(), cause: Box::new(cause) })?;
        let wrong = |what: String| Err(SimError::Scenario { path: path.to_owned(), what });
        if scenario.policies.is_empty() {
            return wrong("it names no policy".to_owned());
        }
        for request in &mut scenario.request {
            let Some(trace) = &request.trace else { continue };
            let file = path.parent().unwrap_or(Path::new(".")).join(trace);
            let bytes = fs::read(&file).map_err(|cause| SimError::Read { path: file.clone(), cause })?;
            let header = *TraceReader::open(&bytes).map_err(|cause| SimError::Trace { path: file, cause })?.header();
            for (number, traced) in [(&mut request.prompt, header.prompt), (&mut request.tokens, header.steps)] {
                if *number == 0 {
                    *number = traced as usize;
                }
            }
        }
        for (number, request) in (1..).zip(&scenario.request) {
            let Request { prompt, tokens, .. } = *request;
            if prompt == 0 || tokens == 0 {
                return wrong(format!("request {number} has no prompt, or asks for no token"));
            }
            let needed = prompt.saturating_add(tokens);
            if needed > scenario.context {
                return wrong(format!(
                    "request {number} takes {needed} tokens, but there is room for {}",
                    scenario.context
                ));
            }
        }
        if let Some(named) = scenario
            .expect
            .iter()
            .filter_map(|expect| expect.policy.as_ref())
            .find(|&policy| !scenario.policies.contains(policy))
        {
            return wrong(format!("something is expected of the policy {named:?}, which is not among its policies"));
        }
        Ok(scenario)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "name='a'\nboard='b'\nmodel='m'\npolicies=['full']\ncontext=100\n";

    fn parse(text: &str) -> Result<Scenario, SimError> {
        Scenario::parse(text, Path::new("s.toml"))
    }

    #[test]
    fn what_a_scenario_says_is_checked() {
        let scenario =
            parse(&format!("{GOOD}[[request]]\nprompt=60\ntokens=40\n[[shrink]]\nat='2s'\nby='1GiB'\n")).unwrap();
        assert_eq!((scenario.request.len(), scenario.shrink[0].by), (1, Size(1 << 30)));
        for (text, message) in [
            ("name='a'", "board"),
            (&*GOOD.replace("'full'", ""), "no policy"),
            (&format!("{GOOD}[[request]]\nprompt=61\ntokens=40\n"), "takes 101 tokens"),
            (&format!("{GOOD}[[request]]\nprompt=0\ntokens=40\n"), "no prompt"),
            (&format!("{GOOD}[[expect]]\npolicy='small'\n"), "not among its policies"),
            (&format!("{GOOD}[[expect]]\nfast=true\n"), "unknown field"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("s.toml"), "{error}");
        }
    }

    #[test]
    fn a_trace_is_a_request() {
        use thinkey_core::{
            trace::{MAGIC, TraceHeader, VERSION},
            wire,
        };
        let header = TraceHeader {
            magic: MAGIC,
            version: VERSION,
            model: "tiny",
            head_dim: 16,
            group: 2,
            window: 8,
            prompt: 60,
            steps: 30,
            heads: 1,
            residual: false,
        };
        let mut memory = [0; 128];
        let frame = wire::encode(&header, &mut memory).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("t"), [&(frame.len() as u16).to_le_bytes(), &*frame].concat()).unwrap();
        let parse = |text: &str| Scenario::parse(&format!("{GOOD}[[request]]\n{text}"), &folder.path().join("s.toml"));
        let lengths = |text: &str| parse(text).map(|scenario| (scenario.request[0].prompt, scenario.request[0].tokens));
        assert_eq!(lengths("trace='t'\n").unwrap(), (60, 30));
        assert_eq!(lengths("trace='t'\ntokens=7\n").unwrap(), (60, 7));
        assert!(lengths("trace='t'\ntokens=41\n").unwrap_err().to_string().contains("takes 101 tokens"));
        assert!(matches!(lengths("trace='none'\n"), Err(SimError::Read { .. })));
        fs::write(folder.path().join("t"), "no trace").unwrap();
        assert!(matches!(lengths("trace='t'\n"), Err(SimError::Trace { .. })));
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(text in "\\PC{0,200}", lines in prop::collection::vec("[a-z]{1,8}='?[0-9a-zA-Z.]{0,9}'?", 0..6)) {
            let _ = parse(&text);
            let _ = parse(&format!("{GOOD}{}", lines.join("\n")));
        }
    }
}
