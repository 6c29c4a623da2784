//! A Hugging Face folder: `config.json` and safetensors, whole or in shards.

use super::{
    Role, WeightsError, hf_config,
    map::{self, Maps},
    tensor::{Format, Tensor, Tensors},
};
use crate::model::config::{ConfigError, ModelConfig};
use ::safetensors::{
    Dtype, SafeTensorError, SafeTensors,
    tensor::{Metadata, TensorInfo},
};
use bytes::Bytes;
use serde::Deserialize;
use std::{
    collections::{BTreeSet, HashMap},
    path::{Component, Path},
};
use thinkey_kernels::format::WeightFormat;

/// The file of an unsharded model.
pub(super) const SINGLE: &str = "model.safetensors";

/// The file that says which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Longest `config.json` in bytes; real ones have one or two KiB.
const MAX_CONFIG: u64 = 1 << 20;

/// Longest index in bytes; a 405B model's has 100 KiB.
const MAX_INDEX: u64 = 1 << 26;

/// An open folder.
pub(super) struct Folder {
    /// Shape of the model.
    pub config: ModelConfig,
    /// The tensors of all shards.
    pub tensors: Tensors,
    /// Number of files that hold them.
    pub shards: usize,
    /// Bytes of these files.
    pub size: u64,
    /// Their maps.
    pub maps: Maps,
}

/// Why a file of a Hugging Face folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SafetensorsError {
    /// Text that is not the JSON that it should be.
    #[error("not as expected: {0}")]
    Json(#[from] serde_json::Error),
    /// A JSON file of absurd length.
    #[error("longer than {limit} bytes; this is not the file it should be")]
    TooLong {
        /// Most bytes it may have.
        limit: u64,
    },
    /// A field that the model cannot do without.
    #[error("field {field:?} is missing")]
    NoField {
        /// Name of the field.
        field: &'static str,
    },
    /// A shape that cannot run here.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A shard that is not a plain file name, such as `../../etc/passwd`.
    #[error("the index names the shard {shard:?}; a shard must be a file of the same folder")]
    ShardName {
        /// As the index has it.
        shard: String,
    },
    /// A shard that is not there.
    #[error("the index names the shard {shard:?}, which is not in the folder; download it")]
    NoShard {
        /// As the index has it.
        shard: String,
    },
    /// An index without a shard.
    #[error("the index names no tensors")]
    EmptyIndex,
    /// A tensor that is not where the index says.
    #[error("the index says that tensor {tensor:?} is in this file, but it is not; download the folder again")]
    NotInShard {
        /// Name of the tensor.
        tensor: String,
    },
    /// A tensor that is where the index does not say.
    #[error(
        "holds tensor {tensor:?}, which by the index is {}; download the folder again",
        indexed.as_ref().map_or_else(|| "nowhere".into(), |shard| format!("in {shard:?}"))
    )]
    NotIndexed {
        /// Name of the tensor.
        tensor: String,
        /// The shard where the index says it is.
        indexed: Option<String>,
    },
    /// The file ends before its header or its tensors do, or goes on after them.
    #[error("header and tensors take {need} bytes, but the file has {have}: cut off or damaged; download it again")]
    Length {
        /// Bytes that the header asks for.
        need: u64,
        /// Length of the file.
        have: u64,
    },
    /// Anything else the safetensors library finds.
    #[error("not a usable safetensors file: {0}")]
    Invalid(SafeTensorError),
}

/// Opens the folder at `path`, which holds [`SINGLE`] or [`INDEX`].
pub(super) fn open(path: &Path) -> Result<Folder, WeightsError> {
    let single = path.join(SINGLE);
    let index = if single.is_file() { None } else { Some(Index::open(path)?) };
    let files = match &index {
        None => BTreeSet::from([SINGLE]),
        Some(index) => index.weight_map.values().map(String::as_str).collect(),
    };

    let (mut tensors, mut size, mut maps) = (Tensors::default(), 0, Maps::default());
    for &file in &files {
        let path = path.join(file);
        let bytes = map::map(&path, &mut maps)?;
        size += bytes.len() as u64;
        for tensor in read(&bytes).map_err(|problem| WeightsError::safetensors(&path, problem))? {
            let indexed = index.as_ref().map(|index| index.weight_map.get(&tensor.name));
            if let Some(indexed) = indexed.filter(|shard| shard.is_none_or(|shard| shard != file)) {
                let problem = SafetensorsError::NotIndexed { tensor: tensor.name, indexed: indexed.cloned() };
                return Err(WeightsError::safetensors(&path, problem));
            }
            // Names are keys of the file's header, and the index puts each into one file.
            assert!(tensors.push(tensor).is_ok(), "a name occurs once");
        }
    }
    let lost = index.iter().flat_map(|index| &index.weight_map).filter(|(name, _)| tensors.get(name).is_none()).min();
    if let Some((tensor, shard)) = lost {
        let problem = SafetensorsError::NotInShard { tensor: tensor.clone() };
        return Err(WeightsError::safetensors(&path.join(shard), problem));
    }

    let file = path.join("config.json");
    let json = text(&file, MAX_CONFIG)?;
    let has_output = tensors.get(&Role::Output.hugging_face_name()).is_some();
    let config = hf_config::parse(&json, has_output).map_err(|problem| WeightsError::safetensors(&file, problem))?;
    Ok(Folder { config, tensors, shards: files.len(), size, maps })
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// Tensor to file.
    weight_map: HashMap<String, String>,
}

impl Index {
    /// Reads the index of `folder` and sees that its files are there.
    fn open(folder: &Path) -> Result<Self, WeightsError> {
        let path = folder.join(INDEX);
        let json = text(&path, MAX_INDEX)?;
        Self::parse(&json, folder).map_err(|problem| WeightsError::safetensors(&path, problem))
    }

    fn parse(json: &[u8], folder: &Path) -> Result<Self, SafetensorsError> {
        let index: Self = serde_json::from_slice(json)?;
        if index.weight_map.is_empty() {
            return Err(SafetensorsError::EmptyIndex);
        }
        for shard in index.weight_map.values().collect::<BTreeSet<_>>() {
            let mut parts = Path::new(shard).components();
            let plain =
                matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == shard.as_str());
            if !plain || shard.contains(['\\', '\0']) {
                return Err(SafetensorsError::ShardName { shard: shard.clone() });
            }
            if !folder.join(shard).is_file() {
                return Err(SafetensorsError::NoShard { shard: shard.clone() });
            }
        }
        Ok(index)
    }
}

fn text(path: &Path, limit: u64) -> Result<Vec<u8>, WeightsError> {
    map::read(path, limit)?.ok_or_else(|| WeightsError::safetensors(path, SafetensorsError::TooLong { limit }))
}

/// The tensors of one file, in its order. The library has checked that they lie side by side and fill the file.
pub(super) fn read(file: &Bytes) -> Result<Vec<Tensor>, SafetensorsError> {
    let (header, metadata) = SafeTensors::read_metadata(file).map_err(|error| problem(file, error))?;
    let start = size_of::<u64>() + header;
    let tensor = |name: String| {
        let TensorInfo { dtype, shape, data_offsets: (from, to) } = metadata.info(&name)?.clone();
        let format = match dtype {
            Dtype::F32 => Format::Known(WeightFormat::F32),
            Dtype::F16 => Format::Known(WeightFormat::F16),
            Dtype::BF16 => Format::Known(WeightFormat::Bf16),
            other => Format::Unknown(format!("{other:?}").into()),
        };
        Some(Tensor { name, shape, format, bytes: file.slice(start + from..start + to) })
    };
    Ok(metadata.offset_keys().into_iter().filter_map(tensor).collect())
}

/// The library's error, with numbers where it is about the length of the file.
fn problem(file: &[u8], error: SafeTensorError) -> SafetensorsError {
    let header = file.first_chunk().map(|&len| u64::from_le_bytes(len));
    let need = match (&error, header) {
        (SafeTensorError::HeaderTooSmall, _) => Some(size_of::<u64>() as u64),
        (SafeTensorError::InvalidHeaderLength, Some(header)) => Some(header.saturating_add(size_of::<u64>() as u64)),
        (SafeTensorError::MetadataIncompleteBuffer, Some(header)) => {
            let data = &file[size_of::<u64>()..];
            let metadata = usize::try_from(header).ok().and_then(|header| data.get(..header));
            metadata
                .and_then(|json| serde_json::from_slice::<Metadata>(json).ok())
                .map(|metadata| size_of::<u64>() as u64 + header + metadata.data_len() as u64)
        }
        _ => None,
    };
    need.map_or(SafetensorsError::Invalid(error), |need| SafetensorsError::Length { need, have: file.len() as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::config::Architecture,
        weights::{Checkpoint, fixture},
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::fs;

    /// A file of that header and so many zeros.
    fn file(header: &str, data: usize) -> Bytes {
        let len = header.len() as u64;
        [&len.to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat().into()
    }

    fn error(file: &Bytes) -> String {
        read(file).err().expect("the file is damaged").to_string()
    }

    #[test]
    fn dtypes_are_read_and_others_kept_for_the_message() {
        let header = r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},
            "b":{"dtype":"BF16","shape":[1,2],"data_offsets":[4,8]},
            "c":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},
            "d":{"dtype":"BF16","shape":[2],"data_offsets":[16,20]}}"#;
        let mut bytes = file(header, 20).to_vec();
        let data = bytes.len() - 20;
        bytes[data + 16..].copy_from_slice(&[0x80, 0x3f, 0x00, 0xc0]);
        bytes[data..data + 8].copy_from_slice(&[0x00, 0x3c, 0x00, 0xc0, 0x80, 0x3f, 0x00, 0xc0]);
        let tensors = read(&bytes.into()).unwrap();
        assert_eq!(tensors[0].vector().unwrap(), [1.0, -2.0]);
        let matrix = tensors[1].matrix().unwrap();
        assert_eq!((matrix.format(), matrix.rows(), matrix.cols()), (WeightFormat::Bf16, 1, 2));
        assert_eq!(matrix.bytes(), [0x80, 0x3f, 0x00, 0xc0]);
        assert_eq!(tensors[3].vector().unwrap(), [1.0, -2.0]);
        assert_eq!(tensors[2].format.name(), "I64");
        assert!(tensors[2].check(&[1]).unwrap_err().to_string().starts_with("tensor \"c\" is stored as I64, which"));
    }

    #[test]
    fn lengths_that_do_not_fit_are_said_in_bytes() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let whole = file(header, 8);
        assert_eq!(read(&whole).unwrap().len(), 1);
        let message = |need: u64, have: usize| {
            format!(
                "header and tensors take {need} bytes, but the file has {have}: cut off or damaged; download it again"
            )
        };
        let len = whole.len();
        assert_eq!(error(&whole.slice(..len - 1)), message(len as u64, len - 1));
        assert_eq!(error(&file(header, 9)), message(len as u64, len + 1));
        assert_eq!(error(&whole.slice(..20)), message(8 + header.len() as u64, 20));
        assert_eq!(error(&whole.slice(..7)), message(8, 7));
        assert_eq!(error(&Bytes::new()), message(8, 0));
        assert!(error(&[0xff; 32].to_vec().into()).starts_with("not a usable safetensors file: "));
    }

    #[test]
    fn offsets_that_lie_are_refused() {
        for header in [
            // Overlapping, with a gap, backwards, of another length than the shape, and overflowing.
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#,
            r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#,
            "{",
        ] {
            let found = error(&file(header, 12));
            assert!(found.starts_with("not a usable safetensors file: "), "{header}: {found}");
        }
    }

    #[test]
    fn shards_are_where_the_index_says_or_it_is_an_error() {
        let model = fixture::config(Architecture::Llama);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fixture::folder(&model, path, 2);
        let whole: Value = serde_json::from_slice(&fs::read(path.join(INDEX)).unwrap()).unwrap();
        let opened = |change: &dyn Fn(&mut Value)| {
            let mut index = whole.clone();
            change(&mut index["weight_map"]);
            fs::write(path.join(INDEX), index.to_string()).unwrap();
            Checkpoint::open(path).map(|model| model.config().layers).map_err(|error| error.to_string())
        };
        let error = |change: &dyn Fn(&mut Value), file: &str, expected: &str| {
            let found = opened(change).unwrap_err();
            assert!(found.contains(file) && found.contains(expected), "{found}");
        };
        assert_eq!(opened(&|_| {}), Ok(2));

        let norm = Role::OutputNorm.hugging_face_name();
        for shard in ["../model-0.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b", "./m", "m/"] {
            let expected = format!("the index names the shard {shard:?}; a shard must be a file of the same folder");
            error(&|map| map[&norm] = json!(shard), INDEX, &expected);
        }
        error(
            &|map| map[&norm] = json!("gone"),
            INDEX,
            "the index names the shard \"gone\", which is not in the folder",
        );
        error(&|map| *map = json!({}), INDEX, "the index names no tensors");
        error(&|map| *map = json!([]), INDEX, "not as expected: invalid type: sequence, expected a map");
        let at = whole["weight_map"][&norm].as_str().unwrap();
        let other = fixture::shard(usize::from(at == fixture::shard(0)));
        error(
            &|map| map[&norm] = json!(other),
            at,
            &format!("holds tensor \"model.norm.weight\", which by the index is in {other:?}; download"),
        );
        error(
            &|map| _ = map.as_object_mut().unwrap().remove(&norm),
            at,
            "holds tensor \"model.norm.weight\", which by the index is nowhere; download",
        );
        error(
            &|map| map["more"] = json!(at),
            at,
            "the index says that tensor \"more\" is in this file, but it is not; download",
        );

        opened(&|_| {}).unwrap();
        fs::write(path.join("config.json"), vec![b' '; MAX_CONFIG as usize + 1]).unwrap();
        error(&|_| {}, "config.json", "longer than 1048576 bytes");
        fs::remove_file(path.join("config.json")).unwrap();
        error(&|_| {}, "config.json", "cannot read ");
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(
            changes in prop::collection::vec((0_usize..2500, any::<u8>()), 1..4),
            keep in prop::option::of(0.0..1.0),
        ) {
            let model = fixture::config(Architecture::Llama);
            let mut bytes = fixture::safetensors(&model, &Role::needed(&model).collect::<Vec<_>>());
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            if let Some(keep) = keep {
                bytes.truncate((bytes.len() as f64 * keep) as usize);
            }
            let len = bytes.len();
            if let Ok(tensors) = read(&bytes.into()) {
                prop_assert!(tensors.iter().map(|tensor| tensor.bytes.len()).sum::<usize>() < len);
            }
        }

        #[test]
        fn damaged_configs_never_panic(at in 0_usize..500, byte in any::<u8>(), has_output in any::<bool>()) {
            let mut json = fixture::json(&fixture::config(Architecture::Qwen3)).to_string().into_bytes();
            let at = at % json.len();
            json[at] = byte;
            if let Ok(config) = hf_config::parse(&json, has_output) {
                prop_assert_eq!(config.validate(), Ok(()));
            }
        }
    }
}
