//! GGUF, versions 2 and 3, little-endian: the file of llama.cpp and its kin.
//!
//! A header (magic, version, counts), the metadata, one record a tensor, padding, then the tensors' bytes. An own
//! reader, because the `ggus` crate trusts the file: it allocates as many entries as the header claims, adds offsets
//! without looking for overflow, slices past the end of truncated files, and knows only version 3. Here nothing is
//! allocated on the word of a count, all arithmetic is checked, and every tensor is known to lie inside the file, apart
//! from all others, before the first is used. Opening touches the header's pages only.
//!
//! Specification: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use super::{
    cursor::{Cursor, Short},
    metadata::{MAX_KEYS, Metadata, MetadataError},
    tensor::{Extents, Format, Tensor, TensorError, Tensors},
};
use crate::model::config::ConfigError;
use bytes::Bytes;
use std::ops::Range;
use thinkey_kernels::format::WeightFormat;

/// Most tensors a file may have; a 405B model has some 1,100.
const MAX_TENSORS: u64 = 1 << 16;

/// Longest name of a tensor in bytes. The specification says 64; some writers use more.
const MAX_NAME: usize = 1024;

/// Most axes of a tensor.
const MAX_AXES: u32 = 4;

/// Where tensors start, where the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// An open GGUF file.
pub(super) struct Gguf {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Everything but the tensors.
    pub metadata: Metadata,
    /// The tensors.
    pub tensors: Tensors,
}

/// Why a GGUF file cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The header ends early.
    #[error(transparent)]
    Short(#[from] Short),
    /// Another kind of file.
    #[error("not a GGUF file: it starts with \"{}\" instead of \"GGUF\"", found.escape_ascii())]
    Magic {
        /// The first bytes, four at most.
        found: Vec<u8>,
    },
    /// Written for big-endian machines.
    #[error("a big-endian GGUF file; convert it with gguf-py's gguf_convert_endian.py")]
    BigEndian,
    /// A version that nobody writes any more, or not yet.
    #[error("GGUF version {version} is not supported; supported are 2 and 3: convert the model again")]
    Version {
        /// Version of the file.
        version: u32,
    },
    /// More entries than the file has room for, or than anyone needs.
    #[error(
        "the header claims {claimed} {what}, but there can be {limit} at most: cut off or damaged; download it again"
    )]
    Count {
        /// What is counted.
        what: &'static str,
        /// By the header.
        claimed: u64,
        /// By the length of the file and common sense.
        limit: u64,
    },
    /// A metadata value.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// An alignment that is none.
    #[error("general.alignment is {alignment}; it must be a power of two")]
    Alignment {
        /// By the file.
        alignment: u64,
    },
    /// A tensor whose name cannot be read.
    #[error("the tensor name at byte {at} is not text of 1 to {MAX_NAME} bytes; the file is damaged")]
    Name {
        /// Where it lies.
        at: usize,
    },
    /// Two tensors of one name.
    #[error("tensor {name:?} occurs twice")]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// A tensor whose extents make no sense.
    #[error("tensor {name:?} is {shape} (outermost first); {reason}")]
    Shape {
        /// Its name.
        name: String,
        /// Its extents.
        shape: Extents,
        /// What is wrong with them.
        reason: &'static str,
    },
    /// More axes than GGUF allows, or none.
    #[error("tensor {name:?} has {axes} axes; there must be 1 to {MAX_AXES}")]
    Axes {
        /// Its name.
        name: String,
        /// Number of axes.
        axes: u32,
    },
    /// A tensor that starts between two multiples of the alignment.
    #[error("tensor {name:?} starts at offset {offset}, which is no multiple of the alignment {alignment}")]
    Offset {
        /// Its name.
        name: String,
        /// Its offset in the data.
        offset: u64,
        /// Alignment of the file.
        alignment: u64,
    },
    /// Two tensors that share bytes.
    #[error("tensors {first:?} and {second:?} overlap; the file is damaged")]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The other.
        second: String,
    },
    /// The file ends before its tensors do.
    #[error("the tensors take {need} bytes, but the file has {have}: cut off; download it again")]
    Truncated {
        /// Bytes up to the end of the last tensor (saturated on overflow).
        need: u64,
        /// Length of the file.
        have: u64,
    },
    /// One of several files.
    #[error("one of {count} files of a split model; join them with llama-gguf-split --merge")]
    Split {
        /// Number of files.
        count: u64,
    },
    /// A tensor that the configuration needs.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A shape that cannot run here.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl Gguf {
    /// Reads the header of `file` and checks every tensor's place. Touches no tensor.
    pub fn open(file: &Bytes) -> Result<Self, GgufError> {
        let magic = &file[..file.len().min(4)];
        if magic != b"GGUF" {
            return Err(if magic == b"FUGG" { GgufError::BigEndian } else { GgufError::Magic { found: magic.into() } });
        }
        let mut cursor = Cursor::new(file, 4);
        match cursor.u32()? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
            version => return Err(GgufError::Version { version }),
        }
        let version = u32::from_le_bytes([file[4], file[5], file[6], file[7]]);
        let (tensors, keys) = (cursor.u64()?, cursor.u64()?);
        // The shortest key takes 13 bytes (length, type, a byte), the shortest tensor record 32.
        check_count("metadata keys", keys, MAX_KEYS, cursor.remaining(), 13)?;
        check_count("tensors", tensors, MAX_TENSORS, cursor.remaining(), 32)?;

        let (metadata, end) = Metadata::parse(file.clone(), cursor.position(), keys)?;
        let alignment = metadata.unsigned("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        if !alignment.is_power_of_two() {
            return Err(GgufError::Alignment { alignment });
        }
        let mut cursor = Cursor::new(file, end);
        let records = (0..tensors).map(|_| Record::read(&mut cursor, alignment)).collect::<Result<Vec<_>, _>>()?;
        let tensors = place(file, records, cursor.position(), alignment)?;
        Ok(Self { version, metadata, tensors })
    }
}

fn check_count(what: &'static str, claimed: u64, most: u64, bytes: usize, each: u64) -> Result<(), GgufError> {
    let limit = most.min(bytes as u64 / each);
    if claimed <= limit { Ok(()) } else { Err(GgufError::Count { what, claimed, limit }) }
}

/// What the header says of a tensor.
struct Record {
    name: String,
    shape: Vec<usize>,
    format: Format,
    /// From the start of the data.
    offset: u64,
    /// `None` where the format is unknown.
    len: Option<u64>,
}

impl Record {
    fn read(cursor: &mut Cursor<'_>, alignment: u64) -> Result<Self, GgufError> {
        let at = cursor.position();
        let name = std::str::from_utf8(cursor.text()?).ok().filter(|name| (1..=MAX_NAME).contains(&name.len()));
        let name = name.ok_or(GgufError::Name { at })?.to_owned();
        let axes = cursor.u32()?;
        if !(1..=MAX_AXES).contains(&axes) {
            return Err(GgufError::Axes { name, axes });
        }
        let mut extents = Vec::new();
        for _ in 0..axes {
            extents.push(cursor.u64()?);
        }
        let format = format(cursor.u32()?);
        let offset = cursor.u64()?;

        // The file has the innermost extent first.
        let shape: Vec<usize> =
            extents.iter().rev().map(|&extent| usize::try_from(extent).unwrap_or(usize::MAX)).collect();
        let bad = |reason| GgufError::Shape { name: name.clone(), shape: Extents(shape.clone()), reason };
        if shape.contains(&0) {
            return Err(bad("an extent is zero"));
        }
        let elements = shape.iter().try_fold(1_usize, |product, &extent| product.checked_mul(extent));
        elements.ok_or_else(|| bad("that many elements overflow"))?;
        let len = match format {
            Format::Unknown(_) => None,
            Format::Known(format) => {
                let (&cols, rows) = shape.split_last().expect("one axis at least");
                if !cols.is_multiple_of(format.block_len()) {
                    return Err(bad("its rows are no whole number of blocks"));
                }
                let len = rows.iter().fold(format.row_bytes(cols), |len, &extent| len?.checked_mul(extent));
                Some(len.ok_or_else(|| bad("that many bytes overflow"))? as u64)
            }
        };
        if !offset.is_multiple_of(alignment) {
            return Err(GgufError::Offset { name, offset, alignment });
        }
        Ok(Self { name, shape, format, offset, len })
    }
}

/// Gives every tensor its share of the file. `header` is the length of everything before the data's padding.
fn place(file: &Bytes, records: Vec<Record>, header: usize, alignment: u64) -> Result<Tensors, GgufError> {
    let have = file.len() as u64;
    // A file without tensors needs no padding.
    let start = (header as u64).checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
    let end = |record: &Record| start.saturating_add(record.offset).saturating_add(record.len.unwrap_or(0));
    let need = records.iter().map(end).max().unwrap_or(0);
    if need > have {
        return Err(GgufError::Truncated { need, have });
    }

    let mut order: Vec<&Record> = records.iter().filter(|record| record.len.is_some()).collect();
    order.sort_by_key(|record| record.offset);
    if let Some(pair) = order.windows(2).find(|pair| end(pair[0]) > start + pair[1].offset) {
        return Err(GgufError::Overlap { first: pair[0].name.clone(), second: pair[1].name.clone() });
    }

    let mut tensors = Tensors::default();
    for record in records {
        let at: Range<usize> = (start + record.offset) as usize..end(&record) as usize;
        let Record { name, shape, format, .. } = record;
        tensors
            .push(Tensor { name, shape, format, bytes: file.slice(at) })
            .map_err(|tensor| GgufError::DuplicateTensor { name: tensor.name })?;
    }
    Ok(tensors)
}

/// Number of each supported format in the file, `ggml_type`.
pub(super) const FORMAT_IDS: [(u32, WeightFormat); 11] = [
    (0, WeightFormat::F32),
    (1, WeightFormat::F16),
    (2, WeightFormat::Q4_0),
    (3, WeightFormat::Q4_1),
    (6, WeightFormat::Q5_0),
    (7, WeightFormat::Q5_1),
    (8, WeightFormat::Q8_0),
    (12, WeightFormat::Q4K),
    (13, WeightFormat::Q5K),
    (14, WeightFormat::Q6K),
    (30, WeightFormat::Bf16),
];

fn format(id: u32) -> Format {
    if let Some(&(_, format)) = FORMAT_IDS.iter().find(|&&(known, _)| known == id) {
        return Format::Known(format);
    }
    let name = match id {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return Format::Unknown(format!("type {id}").into()),
    };
    Format::Unknown(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{GgufWriter, fixture::patched};
    use thinkey_kernels::format::Matrix;

    fn matrix(format: WeightFormat, rows: usize, fill: u8) -> Matrix {
        let bytes = (0..format.row_bytes(256).unwrap() * rows).map(|at| fill.wrapping_add(at as u8)).collect();
        Matrix::new(format, rows, 256, bytes).unwrap()
    }

    /// Two matrices: "one" of 2×256 F32 at offset 0, "two" of 3×256 Q4_0 at offset 2048.
    fn pair() -> GgufWriter {
        let mut file = GgufWriter::default();
        file.set("general.alignment", 32_u32);
        file.matrix("one", &matrix(WeightFormat::F32, 2, 1)).matrix("two", &matrix(WeightFormat::Q4_0, 3, 2));
        file
    }

    fn error(bytes: Vec<u8>) -> GgufError {
        Gguf::open(&bytes.into()).err().expect("the file is damaged")
    }

    #[test]
    fn every_format_comes_back_as_it_was_written() {
        let mut file = GgufWriter::default();
        for (at, format) in WeightFormat::ALL.into_iter().enumerate() {
            file.matrix(format.name(), &matrix(format, at + 1, at as u8));
        }
        let gguf = Gguf::open(&file.to_bytes().into()).unwrap();
        for (at, format) in WeightFormat::ALL.into_iter().enumerate() {
            let found = gguf.tensors.get(format.name()).unwrap().matrix().unwrap();
            assert_eq!((found.format(), found.rows(), found.cols()), (format, at + 1, 256));
            assert_eq!(found.bytes(), matrix(format, at + 1, at as u8).bytes());
        }
    }

    #[test]
    fn versions_two_and_three_are_read_and_others_named() {
        let version = |bytes: [u8; 4]| {
            let file = pair().to_bytes();
            Gguf::open(&[&file[..4], &bytes, &file[8..]].concat().into()).map(|gguf| gguf.version)
        };
        assert_eq!((version([2, 0, 0, 0]).ok(), version([3, 0, 0, 0]).ok()), (Some(2), Some(3)));
        assert_eq!(version([1, 0, 0, 0]).err(), Some(GgufError::Version { version: 1 }));
        assert_eq!(version([4, 0, 0, 0]).err(), Some(GgufError::Version { version: 4 }));
        assert_eq!(version([0, 0, 0, 3]).err(), Some(GgufError::BigEndian));
        assert_eq!(error(b"FUGG\0\0\0\x03".to_vec()), GgufError::BigEndian);
        assert_eq!(
            error(b"PK\x03\x04".to_vec()).to_string(),
            "not a GGUF file: it starts with \"PK\\x03\\x04\" instead of \"GGUF\""
        );
    }

    #[test]
    fn lying_headers_are_found_out() {
        let file = pair().to_bytes();
        let len = file.len();
        let spoilt = |after: &str, skip: usize, bytes: &[u8]| error(patched(&file, after, skip, bytes)).to_string();
        let huge = (u64::MAX / 2).to_le_bytes();
        // Counts of tensors and keys come after magic and version; a tensor's record is its name, the number of axes,
        // the extents, the format and the offset.
        assert_eq!(
            spoilt("GGUF", 4, &huge),
            format!(
                "the header claims {} tensors, but there can be {} at most: cut off or damaged; download it again",
                u64::MAX / 2,
                (len - 24) / 32
            )
        );
        assert!(spoilt("GGUF", 12, &huge).contains(" metadata keys, but there can be "));
        assert_eq!(spoilt("general.alignment", 4, &[0; 4]), "general.alignment is 0; it must be a power of two");
        assert_eq!(
            spoilt("general.alignment", 4, &[24, 0, 0, 0]),
            "general.alignment is 24; it must be a power of two"
        );
        assert!(
            spoilt("general.alignment", 4, &[0, 0, 0, 0x80]).starts_with("tensor \"two\" starts at offset 2048, which")
        );
        assert_eq!(spoilt("one", 0, &[5, 0, 0, 0]), "tensor \"one\" has 5 axes; there must be 1 to 4");
        assert_eq!(spoilt("one", 0, &[0; 4]), "tensor \"one\" has 0 axes; there must be 1 to 4");
        assert_eq!(spoilt("one", 4, &[0; 8]), "tensor \"one\" is 2×0 (outermost first); an extent is zero");
        assert!(spoilt("one", 4, &huge).ends_with("that many bytes overflow"));
        assert!(spoilt("one", 12, &huge).ends_with("that many elements overflow"));
        assert_eq!(
            spoilt("two", 4, &33_u64.to_le_bytes()),
            "tensor \"two\" is 3×33 (outermost first); its rows are no whole number of blocks"
        );
        assert_eq!(
            spoilt("two", 24, &2049_u64.to_le_bytes()),
            "tensor \"two\" starts at offset 2049, which is no multiple of the alignment 32"
        );
        assert_eq!(
            spoilt("two", 24, &2016_u64.to_le_bytes()),
            "tensors \"one\" and \"two\" overlap; the file is damaged"
        );
        assert_eq!(
            spoilt("two", 24, &2080_u64.to_le_bytes()),
            format!("the tensors take {} bytes, but the file has {len}: cut off; download it again", len + 32)
        );
        assert!(spoilt("two", 24, &(u64::MAX - 31).to_le_bytes()).contains(&format!("take {} bytes", u64::MAX)));
        // A tensor that cannot be measured must start inside the file all the same.
        let unknown = [&16_u32.to_le_bytes()[..], &(1_u64 << 40).to_le_bytes()].concat();
        assert!(spoilt("two", 20, &unknown).starts_with("the tensors take "));
        assert_eq!(error(patched(&file, "tw", 0, b"\xff")), GgufError::Name { at: position(&file, "two") - 8 });
        let same = [&file[..position(&file, "two")], b"one", &file[position(&file, "two") + 3..]].concat();
        assert_eq!(error(same), GgufError::DuplicateTensor { name: "one".into() });
    }

    fn position(file: &[u8], name: &str) -> usize {
        file.windows(name.len()).position(|window| window == name.as_bytes()).unwrap()
    }

    #[test]
    fn a_cut_off_file_says_how_much_is_missing() {
        let file = Bytes::from(pair().to_bytes());
        let open = |len: usize| Gguf::open(&file.slice(..len)).err().unwrap();
        let (need, have) = (file.len() as u64, file.len() - 1);
        assert_eq!(open(have), GgufError::Truncated { need, have: have as u64 });
        assert_eq!(
            open(30).to_string(),
            "the header claims 1 metadata keys, but there can be 0 at most: cut off or damaged; download it again"
        );
        let header = position(&file, "two") + 10;
        assert!(matches!(open(header), GgufError::Short(Short { have, .. }) if have == header));
    }
}
