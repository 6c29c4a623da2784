//! Retrieval: a fact is told once in a long prompt, and asked for at its end.
//!
//! The passkey test hides a number in sentences that repeat (Mohtashami & Jaggi, arXiv 2305.16300), the needle test in real
//! text. A prompt is read once for all policies; then each answers greedily over its own cache. The answer counts if its
//! first run of digits is the number. The first token of an answer comes of exact attention, whatever the policy; the rest
//! does not, which is why the numbers have five digits.

use super::{
    EvalError,
    haystack::{Around, Haystack},
    line,
    session::prefill,
    session_for,
    stats::likeliest,
    with_reference,
};
use crate::{
    engine::{Engine, Session},
    policy::Calibration,
    text::Tokenizer,
};
use serde::Serialize;
use thinkey_core::policy::Policy;

/// Sentences that the passkey is hidden in, over and over.
const FILLER: &str = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Places that a needle tells a number of.
const CITIES: [&str; 16] = [
    "Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Tunis", "Perth", "Riga", "Lima", "Kyoto", "Dakar", "Cork", "Porto",
    "Bergen", "Havana", "Turin",
];

/// Most tokens of an answer.
const ANSWER: usize = 8;

/// What a fact is hidden in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test<'a> {
    /// Sentences that repeat.
    Passkey,
    /// A text.
    Needle(&'a str),
}

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RetrievalOptions {
    /// Tokens of a prompt.
    pub lengths: Vec<usize>,
    /// Where the fact is, in percent of what surrounds it.
    pub depths: Vec<usize>,
    /// Prompts of each length and depth.
    pub trials: usize,
    /// Same seed, same prompts.
    pub seed: u64,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RetrievalReport {
    /// How.
    #[serde(flatten)]
    pub options: RetrievalOptions,
    /// The policies, [the one that others are compared with](with_reference) first.
    pub policies: Vec<RetrievalRow>,
}

/// What one policy found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RetrievalRow {
    /// The policy.
    #[serde(serialize_with = "line")]
    pub policy: Policy,
    /// Facts found, by depth and length: `found[depth][length]` of the trials.
    pub found: Vec<Vec<usize>>,
    /// Facts found.
    pub total: usize,
    /// Facts asked for.
    pub asked: usize,
}

/// A fact to find.
struct Fact {
    told: String,
    question: String,
    number: String,
}

/// Measures `policies`. `progress` is told how many prompts of how many are through.
///
/// # Errors
/// [`EvalError`] where a policy is not supported, a prompt is too short for the fact or too long for text or model, or a
/// depth is none.
pub fn measure(
    engine: &mut Engine,
    calibration: Option<&Calibration>,
    tokenizer: &Tokenizer,
    test: Test<'_>,
    policies: &[Policy],
    options: &RetrievalOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<RetrievalReport, EvalError> {
    let RetrievalOptions { lengths, depths, trials, seed } = options;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    for (what, number) in
        [("the number of lengths", longest), ("the number of depths", depths.len()), ("the number of trials", *trials)]
    {
        if number == 0 {
            return Err(EvalError::Zero { what });
        }
    }
    if let Some(&depth) = depths.iter().find(|&&depth| depth > 100) {
        return Err(EvalError::Depth { depth });
    }
    let (needed, context) = (longest.saturating_add(ANSWER), engine.config().context);
    if needed > context {
        return Err(EvalError::Context { needed, context });
    }
    let haystack = match test {
        // Five sentences are five tokens at the least.
        Test::Passkey => Haystack::new(tokenizer, &FILLER.repeat(longest / 5 + 1))?,
        Test::Needle(text) => Haystack::new(tokenizer, text)?,
    };
    let mut all = Vec::new();
    for policy in with_reference(policies) {
        let found = vec![vec![0; lengths.len()]; depths.len()];
        let row = RetrievalRow { policy, found, total: 0, asked: lengths.len() * depths.len() * trials };
        all.push((session_for(engine, calibration, &policy, needed)?, row));
    }
    let mut random = Random(*seed);
    let mut done = 0;
    for (column, &length) in lengths.iter().enumerate() {
        for (line, &depth) in depths.iter().enumerate() {
            for _ in 0..*trials {
                progress(done, lengths.len() * depths.len() * trials);
                let fact = Fact::new(test, &mut random);
                let prompt = fact.prompt(tokenizer, &haystack, length, depth, random.share(test))?;
                let mut sessions: Vec<_> = all.iter_mut().map(|(session, _)| session).collect();
                sessions.iter_mut().for_each(|session| session.clear(0));
                let mut first = vec![0; sessions.len()];
                prefill(engine, &mut sessions, &prompt, |index, logits| first[index] = likeliest(logits))?;
                for ((session, row), first) in all.iter_mut().zip(first) {
                    let found = usize::from(fact.is_in(&answer(engine, session, tokenizer, first)?));
                    row.found[line][column] += found;
                    row.total += found;
                }
                done += 1;
            }
        }
    }
    progress(done, done);
    Ok(RetrievalReport { options: options.clone(), policies: all.into_iter().map(|(_, row)| row).collect() })
}

/// The greedy answer whose first token is `first`.
fn answer(engine: &mut Engine, session: &mut Session, tokenizer: &Tokenizer, first: u32) -> Result<String, EvalError> {
    let mut tokens = vec![first];
    while tokens.len() < ANSWER
        && let Some(&last) = tokens.last()
        && !tokenizer.is_stop(last)
    {
        let Some(&(next, _)) = engine.decode_best(session, &[0], &[last], 1)?.first() else { break };
        tokens.push(next);
    }
    Ok(tokenizer.decode(&tokens))
}

impl Fact {
    fn new(test: Test<'_>, random: &mut Random) -> Self {
        let number = (10_000 + random.below(90_000)).to_string();
        let (told, question) = match test {
            Test::Passkey => (
                format!("\nThe pass key is {number}. Remember it. {number} is the pass key."),
                "\nWhat is the pass key? The pass key is".to_owned(),
            ),
            Test::Needle(_) => {
                let city = CITIES[random.below(CITIES.len() as u64) as usize];
                (
                    format!("\nThe special number of {city} is {number}."),
                    format!("\nWhat is the special number of {city}? The special number of {city} is"),
                )
            }
        };
        Self { told, question, number }
    }

    fn prompt(
        &self,
        tokenizer: &Tokenizer,
        haystack: &Haystack,
        length: usize,
        depth: usize,
        share: f64,
    ) -> Result<Vec<u32>, EvalError> {
        let around = Around {
            before: tokenizer.prefix().to_vec(),
            fact: tokenizer.encode_continuation(&self.told, None)?,
            question: tokenizer.encode_continuation(&self.question, None)?,
        };
        haystack.prompt(&around, length, depth, share)
    }

    /// Whether the first number of an answer is that which was told.
    fn is_in(&self, answer: &str) -> bool {
        let start = answer.trim_start_matches(|c: char| !c.is_ascii_digit());
        let end = start.find(|c: char| !c.is_ascii_digit()).unwrap_or(start.len());
        start[..end] == self.number
    }
}

/// Numbers that look random and are the same for the same seed: SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// One of the numbers below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Where a haystack begins: sentences that repeat are the same everywhere.
    fn share(&mut self, test: Test<'_>) -> f64 {
        match test {
            Test::Passkey => 0.0,
            Test::Needle(_) => self.below(1000) as f64 / 1000.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::EngineOptions,
        model::Architecture,
        text::fixture,
        weights::{self, Checkpoint, TokenizerSource},
    };
    use std::path::Path;

    fn model() -> (Engine, Tokenizer) {
        let source = fixture::byte_level();
        let mut config = weights::fixture::config(Architecture::Llama);
        (config.vocab, config.context) = (source.tokens.len(), 512);
        let file = weights::fixture::gguf(&config).to_bytes();
        let checkpoint = Checkpoint::from_gguf(Path::new("m.gguf"), file.into()).unwrap();
        let options = EngineOptions { threads: 1, ..EngineOptions::default() };
        let engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
        (engine, Tokenizer::new(TokenizerSource::Gguf(source)).unwrap())
    }

    fn options() -> RetrievalOptions {
        RetrievalOptions { lengths: vec![400, 300], depths: vec![0, 50, 100], trials: 2, seed: 1 }
    }

    #[test]
    fn the_first_number_of_an_answer_counts() {
        let fact = Fact { told: String::new(), question: String::new(), number: "48291".to_owned() };
        for right in ["48291", " 48291.", " the number 48291, not 12345"] {
            assert!(fact.is_in(right), "{right}");
        }
        for wrong in ["", "4829", "482911", " 12345 or 48291", "4 8 2 9 1"] {
            assert!(!fact.is_in(wrong), "{wrong}");
        }
    }

    #[test]
    fn facts_follow_from_the_seed() {
        let facts = |seed, test| {
            let mut random = Random(seed);
            (0..50).map(|_| Fact::new(test, &mut random)).map(|fact| (fact.told, fact.number)).collect::<Vec<_>>()
        };
        for test in [Test::Passkey, Test::Needle("")] {
            assert_eq!(facts(1, test), facts(1, test));
            assert_ne!(facts(1, test), facts(2, test));
            assert!(facts(1, test).iter().all(|(told, number)| number.len() == 5 && told.contains(number)));
        }
    }

    /// Random weights find nothing, but every policy is asked for everything.
    #[test]
    fn every_policy_is_asked_for_every_fact() {
        let (mut engine, tokenizer) = model();
        let policies = ["think".parse().unwrap()];
        let mut seen = Vec::new();
        let text = "Some text that goes on. And on. ".repeat(60);
        for test in [Test::Passkey, Test::Needle(&text)] {
            seen.clear();
            let mut tell = |done, of| seen.push((done, of));
            let report = measure(&mut engine, None, &tokenizer, test, &policies, &options(), &mut tell).unwrap();
            assert_eq!(seen, (0..=12).map(|done| (done, 12)).collect::<Vec<_>>());
            assert_eq!(report.policies.len(), 2);
            for row in &report.policies {
                assert_eq!((row.found.len(), row.found[0].len(), row.asked), (3, 2, 12));
                assert_eq!(row.total, row.found.iter().flatten().sum::<usize>());
            }
        }
    }

    #[test]
    fn what_cannot_be_asked_is_an_error() {
        let (mut engine, tokenizer) = model();
        let mut error = |test, options| {
            measure(&mut engine, None, &tokenizer, test, &[], &options, &mut |_, _| {}).unwrap_err().to_string()
        };
        for (options, says) in [
            (RetrievalOptions { lengths: vec![], ..options() }, "the number of lengths must be at least 1"),
            (RetrievalOptions { depths: vec![], ..options() }, "the number of depths must be at least 1"),
            (RetrievalOptions { trials: 0, ..options() }, "the number of trials must be at least 1"),
            (RetrievalOptions { depths: vec![101], ..options() }, "a depth of 101% is outside 0 to 100"),
            (
                RetrievalOptions { lengths: vec![505], ..options() },
                "513 tokens are more than the model's context of 512",
            ),
            (RetrievalOptions { lengths: vec![20], ..options() }, "a prompt of 20 tokens has no room"),
        ] {
            let error = error(Test::Passkey, options);
            assert!(error.contains(says), "{error}");
        }
        assert!(error(Test::Needle("Short. Text."), options()).contains("tokens of text are needed"));
    }
}
