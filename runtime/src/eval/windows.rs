//! Windows of a text.

use super::EvalError;
use std::{fs, path::Path};

/// The text of a file. Of a `.jsonl` file it is what its lines have under `text` or, without that, `context`, a blank
/// line between them.
///
/// # Errors
/// [`EvalError::Read`], [`EvalError::Line`].
pub fn read_text(path: &Path) -> Result<String, EvalError> {
    let text = fs::read_to_string(path).map_err(|cause| EvalError::Read { path: path.to_owned(), cause })?;
    if path.extension().is_none_or(|extension| extension != "jsonl") {
        return Ok(text);
    }
    let texts = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(|(at, line)| {
        let object: Option<serde_json::Value> = serde_json::from_str(line).ok();
        let text = object.as_ref().and_then(|object| object.get("text").or(object.get("context"))?.as_str());
        text.map(str::to_owned).ok_or_else(|| EvalError::Line { path: path.to_owned(), line: at + 1 })
    });
    Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n\n"))
}

/// `count` windows of `length` tokens, spread evenly from the text's first token to its last, at least `apart` tokens
/// from one to the next. Each begins with `before`, the tokens that the model expects before a text, which count.
///
/// # Errors
/// [`EvalError::Zero`] for no windows, [`EvalError::ShortText`] where not even one fits, [`EvalError::Crowded`] where not
/// so many do.
pub fn spread(
    (before, text): (&[u32], &[u32]),
    length: usize,
    count: usize,
    apart: usize,
) -> Result<Vec<Vec<u32>>, EvalError> {
    if count == 0 {
        return Err(EvalError::Zero { what: "the number of windows" });
    }
    let own = length.saturating_sub(before.len()).max(1);
    let Some(room) = text.len().checked_sub(own) else {
        return Err(EvalError::ShortText { needed: own, available: text.len() });
    };
    let gaps = count - 1;
    if gaps > 0 && room / gaps < apart {
        return Err(EvalError::Crowded { windows: count, most: room / apart + 1 });
    }
    let first = |at: usize| (room * at).checked_div(gaps).unwrap_or(0);
    Ok((0..count).map(|at| [before, &text[first(at)..][..own]].concat()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_reach_from_the_first_token_to_the_last() {
        let text: Vec<u32> = (0..100).collect();
        let windows = spread((&[], &text), 10, 4, 30).unwrap();
        assert_eq!(
            windows.iter().map(|window| (window[0], window[9])).collect::<Vec<_>>(),
            [(0, 9), (30, 39), (60, 69), (90, 99)]
        );
        let windows = spread((&[7, 8], &text), 10, 1, 30).unwrap();
        assert_eq!(windows, [[7, 8, 0, 1, 2, 3, 4, 5, 6, 7]]);
        assert_eq!(spread((&[], &text), 100, 1, 30).unwrap()[0], text);
    }

    #[test]
    fn too_many_or_too_long_ones_are_refused_with_what_fits() {
        let text = [1; 100];
        let crowded = spread((&[], &text), 10, 5, 30).unwrap_err();
        assert!(matches!(crowded, EvalError::Crowded { windows: 5, most: 4 }), "{crowded}");
        let short = spread((&[], &text), 101, 2, 30).unwrap_err();
        assert!(matches!(short, EvalError::ShortText { needed: 101, available: 100 }), "{short}");
        assert!(matches!(spread((&[], &text), 10, 0, 30).unwrap_err(), EvalError::Zero { .. }));
    }

    #[test]
    fn lines_of_json_are_joined() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("texts.jsonl");
        fs::write(&path, "{\"text\":\"a\\nb\"}\n\n{\"context\":\"c\",\"input\":\"d\"}\n").unwrap();
        assert_eq!(read_text(&path).unwrap(), "a\nb\n\nc");
        fs::write(&path, "{\"text\":\"a\"}\n{\"text\":3}\n").unwrap();
        assert!(read_text(&path).unwrap_err().to_string().starts_with("line 2 of "));
        let path = folder.path().join("text.txt");
        fs::write(&path, "{\"text\"").unwrap();
        assert_eq!(read_text(&path).unwrap(), "{\"text\"");
        assert!(matches!(read_text(&folder.path().join("none")).unwrap_err(), EvalError::Read { .. }));
    }
}
