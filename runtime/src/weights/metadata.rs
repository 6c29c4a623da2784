//! GGUF's key-value metadata, read where it lies.

use super::cursor::{Cursor, Short};
use bytes::Bytes;
use std::{collections::HashMap, fmt, ops::Range};

/// Arrays in arrays deeper than this are nobody's metadata.
const MAX_DEPTH: u32 = 4;

/// Most keys a file may have; real files have some thirty.
pub(super) const MAX_KEYS: u64 = 1 << 16;

/// Longest key, by the format's specification.
const MAX_KEY_BYTES: usize = (1 << 16) - 1;

/// Type of a GGUF value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).copied()
    }

    /// Bytes of a value; `None` where that depends on the value.
    fn size(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// What is wrong with a metadata value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// The header ends before the value does.
    #[error(transparent)]
    Short(#[from] Short),
    /// A key that the model cannot do without.
    #[error("metadata key {key:?} is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// A value of another type.
    #[error("metadata key {key:?} is {found}; expected {expected}")]
    Type {
        /// The key.
        key: String,
        /// What is needed.
        expected: &'static str,
        /// What the file has.
        found: String,
    },
    /// Text that is not UTF-8.
    #[error("metadata key {key:?}{} is not valid UTF-8", index.map_or_else(String::new, |at| format!("[{at}]")))]
    Utf8 {
        /// The key.
        key: String,
        /// Which element, in an array.
        index: Option<usize>,
    },
    /// A key that is itself not text, or longer than the format allows.
    #[error("the metadata key at byte {at} is not text of at most 65535 bytes; the file is damaged")]
    Key {
        /// Where the key lies.
        at: usize,
    },
    /// A key that occurs twice.
    #[error("metadata key {key:?} occurs twice")]
    Duplicate {
        /// The key.
        key: String,
    },
    /// A type that the format does not have.
    #[error("metadata key {key:?} has the unknown value type {id}; the file is damaged or newer than GGUF v3")]
    UnknownType {
        /// The key.
        key: String,
        /// Number of the type.
        id: u32,
    },
    /// Arrays in arrays in arrays.
    #[error("metadata key {key:?} nests arrays deeper than {MAX_DEPTH}")]
    Depth {
        /// The key.
        key: String,
    },
    /// A value that makes no sense together with the rest of the file.
    #[error("metadata key {key:?} is {found}; expected {expected}")]
    Value {
        /// The key.
        key: String,
        /// What the file has.
        found: String,
        /// What is needed.
        expected: String,
    },
}

/// Where a value lies.
struct Entry {
    kind: ValueType,
    at: Range<usize>,
}

/// The metadata of a GGUF file. Values stay in the file until they are asked for.
#[derive(Clone)]
pub(super) struct Metadata {
    file: Bytes,
    entries: std::sync::Arc<HashMap<String, Entry>>,
}

impl Metadata {
    /// Finds `count` entries from byte `at` of the file on; gives them and where they end.
    pub fn parse(file: Bytes, at: usize, count: u64) -> Result<(Self, usize), MetadataError> {
        let mut cursor = Cursor::new(&file, at);
        let mut entries = HashMap::new();
        for _ in 0..count {
            let at = cursor.position();
            let key = cursor.text()?;
            let key = std::str::from_utf8(key).ok().filter(|key| key.len() <= MAX_KEY_BYTES);
            let key = key.ok_or(MetadataError::Key { at })?;
            let kind = read_kind(&mut cursor, key)?;
            let start = cursor.position();
            skip(&mut cursor, kind, key, 0)?;
            if entries.insert(key.to_owned(), Entry { kind, at: start..cursor.position() }).is_some() {
                return Err(MetadataError::Duplicate { key: key.to_owned() });
            }
        }
        let end = cursor.position();
        Ok((Self { entries: entries.into(), file }, end))
    }

    /// Whether the key is there.
    pub fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// What `get` finds under `key`, which must be there.
    pub fn need<'a, T>(
        &'a self,
        key: &str,
        get: fn(&'a Self, &str) -> Result<Option<T>, MetadataError>,
    ) -> Result<T, MetadataError> {
        get(self, key)?.ok_or_else(|| MetadataError::Missing { key: key.to_owned() })
    }

    /// A number without sign, of any integer type that holds it: writers disagree about widths.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, MetadataError> {
        self.scalar(key, "an unsigned integer", |kind, bytes| match kind {
            ValueType::U8 | ValueType::U16 | ValueType::U32 | ValueType::U64 => Some(little_endian(bytes)),
            ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => {
                let negative = bytes.last().is_some_and(|&top| top >= 0x80);
                (!negative).then(|| little_endian(bytes))
            }
            _ => None,
        })
    }

    /// A number without sign that fits 32 bits.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, MetadataError> {
        let Some(value) = self.unsigned(key)? else { return Ok(None) };
        u32::try_from(value).map(Some).map_err(|_| MetadataError::Value {
            key: key.to_owned(),
            found: value.to_string(),
            expected: "a number of 32 bits".into(),
        })
    }

    /// A count. Counts of 2³² and more are nobody's.
    pub fn count(&self, key: &str) -> Result<Option<usize>, MetadataError> {
        Ok(self.u32(key)?.map(|value| value as usize))
    }

    /// A floating-point number.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, MetadataError> {
        self.scalar(key, "a floating-point number", |kind, bytes| match kind {
            ValueType::F32 => bytes.try_into().ok().map(f32::from_le_bytes),
            ValueType::F64 => bytes.try_into().ok().map(|bytes| f64::from_le_bytes(bytes) as f32),
            _ => None,
        })
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, MetadataError> {
        self.scalar(key, "a bool (0 or 1)", |kind, bytes| match (kind, bytes) {
            (ValueType::Bool, [0]) => Some(false),
            (ValueType::Bool, [1]) => Some(true),
            _ => None,
        })
    }

    /// Text.
    pub fn text<'a>(&'a self, key: &str) -> Result<Option<&'a str>, MetadataError> {
        let Some(bytes) = self.scalar(key, "a string", |kind, bytes| (kind == ValueType::String).then_some(bytes))?
        else {
            return Ok(None);
        };
        let text = Cursor::new(bytes, 0).text()?;
        std::str::from_utf8(text).map(Some).map_err(|_| MetadataError::Utf8 { key: key.to_owned(), index: None })
    }

    /// An array of text, copied.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>, MetadataError> {
        self.array(key, ValueType::String, "an array of strings", |cursor, index| {
            let text = cursor.text()?.to_vec();
            String::from_utf8(text).map_err(|_| MetadataError::Utf8 { key: key.to_owned(), index: Some(index) })
        })
    }

    /// An array of f32, copied.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>, MetadataError> {
        self.array(key, ValueType::F32, "an array of f32", |cursor, _| Ok(f32::from_le_bytes(cursor.array()?)))
    }

    /// An array of i32, copied.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>, MetadataError> {
        self.array(key, ValueType::I32, "an array of i32", |cursor, _| Ok(i32::from_le_bytes(cursor.array()?)))
    }

    fn scalar<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(ValueType, &'a [u8]) -> Option<T>,
    ) -> Result<Option<T>, MetadataError> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        match read(entry.kind, &self.file[entry.at.clone()]) {
            Some(value) => Ok(Some(value)),
            None => Err(MetadataError::Type { key: key.to_owned(), expected, found: self.describe(entry) }),
        }
    }

    fn array<T>(
        &self,
        key: &str,
        element: ValueType,
        expected: &'static str,
        mut read: impl FnMut(&mut Cursor<'_>, usize) -> Result<T, MetadataError>,
    ) -> Result<Option<Vec<T>>, MetadataError> {
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        let mut cursor = Cursor::new(&self.file[..entry.at.end], entry.at.start);
        if entry.kind != ValueType::Array || read_kind(&mut cursor, key)? != element {
            return Err(MetadataError::Type { key: key.to_owned(), expected, found: self.describe(entry) });
        }
        // `parse` walked over all of them, so the file really holds that many.
        let count = cursor.u64()? as usize;
        (0..count).map(|index| read(&mut cursor, index)).collect::<Result<_, _>>().map(Some)
    }

    /// What an entry is, for messages: its type, and its value where that is short.
    fn describe(&self, entry: &Entry) -> String {
        let bytes = &self.file[entry.at.clone()];
        match entry.kind {
            ValueType::Array => match bytes.first_chunk().and_then(|&id| ValueType::from_id(u32::from_le_bytes(id))) {
                Some(element) => format!("an array of {element}"),
                None => "an array".into(),
            },
            ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => {
                let unused = 64 - 8 * bytes.len() as u32;
                format!("the {} {}", entry.kind, (little_endian(bytes) << unused).cast_signed() >> unused)
            }
            ValueType::U8 | ValueType::U16 | ValueType::U32 | ValueType::U64 | ValueType::Bool => {
                format!("the {} {}", entry.kind, little_endian(bytes))
            }
            ValueType::F32 | ValueType::F64 | ValueType::String => format!("a {}", entry.kind),
        }
    }
}

/// Up to eight bytes as a number.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn read_kind(cursor: &mut Cursor<'_>, key: &str) -> Result<ValueType, MetadataError> {
    let id = cursor.u32()?;
    ValueType::from_id(id).ok_or_else(|| MetadataError::UnknownType { key: key.to_owned(), id })
}

/// Steps over a value. Every element takes at least one byte of the file, so a lying count ends at the end of the file.
fn skip(cursor: &mut Cursor<'_>, kind: ValueType, key: &str, depth: u32) -> Result<(), MetadataError> {
    match kind {
        ValueType::String => {
            cursor.text()?;
        }
        ValueType::Array if depth == MAX_DEPTH => return Err(MetadataError::Depth { key: key.to_owned() }),
        ValueType::Array => {
            let (element, count) = (read_kind(cursor, key)?, cursor.u64()?);
            match element.size() {
                Some(size) => {
                    cursor.skip(count.checked_mul(size))?;
                }
                None => (0..count).try_for_each(|_| skip(cursor, element, key, depth + 1))?,
            }
        }
        scalar => {
            cursor.skip(scalar.size())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One entry: key, number of the type, bytes of the value.
    fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&text(key.as_bytes())[..], &kind.to_le_bytes(), value].concat()
    }

    fn text(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u64).to_le_bytes()[..], bytes].concat()
    }

    /// Bytes of an array's value.
    fn array(kind: u32, count: u64, items: &[u8]) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), items].concat()
    }

    fn parse(entries: &[Vec<u8>]) -> Result<Metadata, MetadataError> {
        let file = Bytes::from(entries.concat());
        let (metadata, end) = Metadata::parse(file.clone(), 0, entries.len() as u64)?;
        assert_eq!(end, file.len());
        Ok(metadata)
    }

    fn error(entries: &[Vec<u8>]) -> String {
        parse(entries).err().expect("the metadata is damaged").to_string()
    }

    #[test]
    fn integers_of_any_width_are_read() {
        let numbers = parse(&[
            entry("u8", 0, &[200]),
            entry("i8", 1, &[0x9c]),
            entry("u16", 2, &[0x39, 0x30]),
            entry("i32", 5, &5_i32.to_le_bytes()),
            entry("i64", 11, &(-5_i64).to_le_bytes()),
            entry("u64", 10, &(1_u64 << 32).to_le_bytes()),
        ])
        .unwrap();
        assert_eq!(numbers.unsigned("u8"), Ok(Some(200)));
        assert_eq!(numbers.unsigned("u16"), Ok(Some(12345)));
        assert_eq!(numbers.u32("i32"), Ok(Some(5)));
        assert_eq!(numbers.unsigned("u64"), Ok(Some(1 << 32)));
        assert_eq!(numbers.u32("absent"), Ok(None));
        let message = |result: Result<Option<u32>, MetadataError>| result.unwrap_err().to_string();
        assert_eq!(message(numbers.u32("u64")), "metadata key \"u64\" is 4294967296; expected a number of 32 bits");
        assert_eq!(message(numbers.u32("i8")), "metadata key \"i8\" is the i8 -100; expected an unsigned integer");
        assert_eq!(message(numbers.u32("i64")), "metadata key \"i64\" is the i64 -5; expected an unsigned integer");
        let missing = numbers.need("absent", Metadata::u32).unwrap_err();
        assert_eq!(missing.to_string(), "metadata key \"absent\" is missing");
    }

    #[test]
    fn values_of_another_type_are_named() {
        let values = parse(&[
            entry("f32", 6, &1.5_f32.to_le_bytes()),
            entry("f64", 12, &2.5_f64.to_le_bytes()),
            entry("true", 7, &[1]),
            entry("two", 7, &[2]),
            entry("text", 8, &text("schön".as_bytes())),
            entry("latin", 8, &text(b"sch\xf6n")),
            entry("texts", 9, &array(8, 2, &[text(b"a"), text(b"\xff")].concat())),
            entry("i32s", 9, &array(5, 2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])),
        ])
        .unwrap();
        assert_eq!((values.f32("f32"), values.f32("f64")), (Ok(Some(1.5)), Ok(Some(2.5))));
        assert_eq!((values.bool("true"), values.text("text")), (Ok(Some(true)), Ok(Some("schön"))));
        assert_eq!(values.i32s("i32s"), Ok(Some(vec![1, -1])));
        let cases = [
            (values.f32("true").err(), "metadata key \"true\" is the bool 1; expected a floating-point number"),
            (values.bool("two").err(), "metadata key \"two\" is the bool 2; expected a bool (0 or 1)"),
            (values.text("f32").err(), "metadata key \"f32\" is a f32; expected a string"),
            (values.text("latin").err(), "metadata key \"latin\" is not valid UTF-8"),
            (values.texts("texts").err(), "metadata key \"texts\"[1] is not valid UTF-8"),
            (values.texts("i32s").err(), "metadata key \"i32s\" is an array of i32; expected an array of strings"),
            (values.f32s("text").err(), "metadata key \"text\" is a string; expected an array of f32"),
        ];
        for (error, expected) in cases {
            assert_eq!(error.unwrap().to_string(), expected);
        }
    }

    #[test]
    fn arrays_that_lie_about_their_length_run_into_the_end() {
        for kind in [0, 8, 10] {
            let found = parse(&[entry("a", 9, &array(kind, u64::MAX, &[0; 64]))]).err();
            assert!(matches!(found, Some(MetadataError::Short(Short { have: 89, .. }))), "{found:?}");
        }
        let long = entry("a", 8, &[&u64::MAX.to_le_bytes()[..], b"text"].concat());
        assert_eq!(
            error(&[long]),
            "the header asks for 18446744073709551615 bytes at byte 21, but the file has 25 in all: cut off or \
             damaged; download it again"
        );
    }

    #[test]
    fn arrays_nest_a_little() {
        let nested = |depth: usize| (1..depth).fold(array(0, 1, &[7]), |inner, _| array(9, 1, &inner));
        parse(&[entry("a", 9, &nested(4))]).unwrap();
        assert_eq!(error(&[entry("a", 9, &nested(5))]), "metadata key \"a\" nests arrays deeper than 4");
        assert_eq!(error(&[entry("a", 9, &nested(100_000))]), "metadata key \"a\" nests arrays deeper than 4");
    }

    #[test]
    fn keys_are_checked() {
        let key = |name: &str| entry(name, 0, &[1]);
        assert_eq!(error(&[key("a"), key("b"), key("a")]), "metadata key \"a\" occurs twice");
        assert_eq!(
            error(&[entry("a", 13, &[])]),
            "metadata key \"a\" has the unknown value type 13; the file is damaged or newer than GGUF v3"
        );
        let long = "k".repeat(MAX_KEY_BYTES + 1);
        assert!(error(&[key(&long)]).starts_with("the metadata key at byte 0 is not text"));
        parse(&[key(&long[1..])]).unwrap();
    }
}
