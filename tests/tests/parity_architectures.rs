//! Every architecture against Hugging Face transformers: tiny random models, recorded by
//! `fixtures/architectures/make.py`, read from Hugging Face folders and from GGUF files.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};
use thinkey::{
    engine::{Activations, Engine, EngineOptions, Session, SessionOptions},
    weights::Checkpoint,
};
use thinkey_core::{Lambda, StorageKind};
use thinkey_tests::recording::{Recording, Tensor};

/// Newest tokens kept whole and queries that score, as in the recordings.
const RECENT: usize = 32;
const WINDOW: usize = 32;

/// How far logits may be off, relative to the largest one of the recording.
///
/// Both sides compute in f32 and sum in different orders: `make.py` finds f32 and f64 up to 7e-7 apart, and these tests
/// were up to 2e-6 off on AVX-512. What `make.py` takes away from a model, to see whether the recording would notice,
/// changes the logits by 5e-4 at least (an epsilon 100 times too large), mostly by more than 0.1.
const TOLERANCE: f32 = 2e-5;

/// The models, and whether there is a GGUF file of them beside the folder.
const MODELS: [(&str, bool); 6] =
    [("llama", false), ("llama3", true), ("mistral", true), ("smollm2", false), ("qwen2", true), ("qwen3", true)];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/architectures").join(name)
}

/// A recording: what was fed, and after how many tokens there are logits.
struct Case {
    recording: Recording,
    tokens: Vec<u32>,
    prompt: usize,
    fed: Vec<usize>,
}

impl Case {
    fn open(model: &str) -> Self {
        let recording = Recording::open(&fixture(model).join("recording.safetensors"));
        let tokens = recording.integers("tokens").data.iter().map(|&token| u32::try_from(token).unwrap()).collect();
        let (prompt, fed) = (recording.integers("prompt").data[0], recording.integers("fed").data);
        assert!(fed[0] == prompt && fed.is_sorted() && fed.len() > 5);
        Self { recording, tokens, prompt, fed }
    }

    /// Feeds the prompt, cut in front of tokens `cuts`, then token by token, and returns the largest error of the logits
    /// along the way.
    fn run(&self, engine: &mut Engine, lambda: Lambda, cuts: &[usize], expected: &Tensor<f32>) -> f32 {
        let mut session = session(engine, self.tokens.len(), lambda);
        let mut from = 0;
        for &cut in cuts {
            prefill(engine, &mut session, &self.tokens[from..cut]);
            from = cut;
        }
        let logits = prefill(engine, &mut session, &self.tokens[from..self.prompt]);
        let mut worst = error(&logits, expected.part(0));
        for fed in self.prompt + 1..=self.fed[self.fed.len() - 1] {
            let logits = engine.decode(&mut session, &[0], &[self.tokens[fed - 1]]).unwrap();
            if let Some(row) = self.fed.iter().position(|&recorded| recorded == fed) {
                worst = worst.max(error(logits, expected.part(row)));
            }
        }
        assert_eq!(session.position(0), self.fed[self.fed.len() - 1]);
        worst
    }
}

fn engine(path: &Path) -> Engine {
    let checkpoint = Checkpoint::open(path).unwrap();
    let options = EngineOptions { threads: 2, activations: Activations::Exact, ..EngineOptions::default() };
    Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap()
}

/// The engines of a model's files.
fn engines(model: &str, gguf: bool) -> Vec<(String, Engine)> {
    let files = [model.to_owned(), format!("{model}.gguf")];
    files.into_iter().take(1 + usize::from(gguf)).map(|file| (file.clone(), engine(&fixture(&file)))).collect()
}

fn session(engine: &Engine, tokens: usize, lambda: Lambda) -> Session {
    let plan = engine.config().cache_plan(1, tokens, RECENT, StorageKind::F32);
    let kept = lambda.kept(engine.config().head_dim);
    engine.session(SessionOptions::new(plan, WINDOW), |_, _| kept).unwrap()
}

fn prefill(engine: &mut Engine, session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    engine.prefill(session, 0, tokens, &mut |_, _| ControlFlow::Continue(())).unwrap().to_vec()
}

/// Largest difference, relative to the largest logit expected.
fn error(logits: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(logits.len(), expected.len());
    let scale = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let off = logits.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // NaN must not pass as the smaller one.
    off.fold(0.0f32, |most, off| if off <= most { most } else { off }) / scale
}

#[test]
fn logits_equal_those_of_transformers() {
    for (model, gguf) in MODELS {
        let case = Case::open(model);
        let expected = case.recording.floats("logits");
        for (file, mut engine) in engines(model, gguf) {
            let off = case.run(&mut engine, Lambda::WHOLE, &[], &expected);
            eprintln!("{file}: off by {off:.1e}");
            assert!(off < TOLERANCE, "{file}: logits are off by {off:e}");
        }
    }
}

/// In two or three parts, cut where the first is one token, where it just fits the tokens kept whole, and where it does
/// not, the later parts longer and shorter than a block.
#[test]
fn a_prompt_in_parts_gives_the_same_logits() {
    for (model, gguf) in MODELS {
        let case = Case::open(model);
        let expected = case.recording.floats("logits");
        for (file, mut engine) in engines(model, gguf) {
            for cuts in [&[1][..], &[64], &[65], &[33, 70], &[case.prompt - 1]] {
                let off = case.run(&mut engine, Lambda::WHOLE, cuts, &expected);
                eprintln!("{file} cut at {cuts:?}: off by {off:.1e}");
                assert!(off < TOLERANCE, "{file} cut at {cuts:?}: logits are off by {off:e}");
            }
        }
    }
}

/// Thin caches against attention that sets the pruned channels to zero.
#[test]
fn thin_caches_equal_a_simulation() {
    let mut compared = 0;
    for (model, gguf) in MODELS {
        let case = Case::open(model);
        for per_mille in (100..1000).step_by(100) {
            let name = format!("think.{per_mille}");
            if !case.recording.has(&name) {
                continue;
            }
            let expected = case.recording.floats(&name);
            for (file, mut engine) in engines(model, gguf) {
                let lambda = Lambda::from_per_mille(per_mille).unwrap();
                let off = case.run(&mut engine, lambda, &[], &expected);
                eprintln!("{file} at {per_mille} per mille: off by {off:.1e}");
                assert!(off < TOLERANCE, "{file} at {per_mille} per mille: logits are off by {off:e}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 5, "only {compared} recordings were found");
}

#[test]
fn both_spellings_of_a_configuration_are_one_model() {
    for (model, _) in MODELS {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(fixture(model)).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        let of_5 = Checkpoint::open(folder.path()).unwrap();
        fs::rename(folder.path().join("config-4.json"), folder.path().join("config.json")).unwrap();
        let of_4 = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(of_5.config(), of_4.config(), "{model}");
    }
}
