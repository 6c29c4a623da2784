//! Control tokens, and how text from outside is kept from naming them.

use std::{borrow::Cow, sync::Arc};

/// Breaks the text of a control token without being part of the text: a Unicode noncharacter, which no interchanged text
/// contains. Tokenizers drop it after they have looked for control tokens.
pub(super) const INERT: char = '\u{FDD0}';

/// The texts that a tokenizer reads as control tokens. Cloning is cheap.
#[derive(Clone, Debug, Default)]
pub struct ControlTokens {
    /// Sorted, without empty texts.
    texts: Arc<[Box<str>]>,
}

impl ControlTokens {
    /// Control tokens with these texts.
    pub fn new<T: Into<Box<str>>>(texts: impl IntoIterator<Item = T>) -> Self {
        let mut texts: Vec<Box<str>> = texts.into_iter().map(Into::into).filter(|text| !text.is_empty()).collect();
        texts.sort_unstable();
        texts.dedup();
        Self { texts: texts.into() }
    }

    /// `content` in a form in which it names no control token: once encoded it is spelled in ordinary tokens, exactly as
    /// written.
    ///
    /// A mark (a Unicode noncharacter that [`Tokenizer::encode`](super::Tokenizer::encode) drops) goes into every control
    /// token that is spelled out, and to an end that could become one together with the text around. Templates that look
    /// at the content see the same text unless they look for control tokens. The mark cannot break a control token of a
    /// single character; models have none.
    pub fn escape<'a>(&self, content: &'a str) -> Cow<'a, str> {
        let mut marks: Vec<usize> = content
            .char_indices()
            .filter(|&(at, _)| self.starts_with(&content[at..]))
            .map(|(at, first)| at + first.len_utf8())
            .collect();
        // What the text around could complete: `content` begins with the end of a control token, ends with the beginning
        // of one, or is the middle of one.
        let cuts = |text: &str, fits: &dyn Fn(usize) -> bool| text.char_indices().skip(1).any(|(cut, _)| fits(cut));
        let tail = |text: &str| cuts(text, &|cut| content.starts_with(&text[cut..]));
        let head = |text: &str| cuts(text, &|cut| content.ends_with(&text[..cut]));
        let middle = |text: &str| !content.is_empty() && text.contains(content);
        if self.texts.iter().any(|text| tail(text) || middle(text)) {
            marks.insert(0, 0);
        }
        if self.texts.iter().any(|text| head(text)) {
            marks.push(content.len());
        }
        if marks.is_empty() {
            return Cow::Borrowed(content);
        }
        let mut inert = String::with_capacity(content.len() + marks.len() * INERT.len_utf8());
        let mut from = 0;
        for mark in marks {
            inert.push_str(&content[from..mark]);
            inert.push(INERT);
            from = mark;
        }
        inert.push_str(&content[from..]);
        Cow::Owned(inert)
    }

    /// Whether `text` begins with a control token.
    pub(super) fn starts_with(&self, text: &str) -> bool {
        // Texts that share the first byte lie together, and most bytes begin none.
        let Some(first) = text.bytes().next() else { return false };
        let from = self.texts.partition_point(|control| control.as_bytes()[0] < first);
        self.texts[from..]
            .iter()
            .take_while(|control| control.as_bytes()[0] == first)
            .any(|control| text.starts_with(&**control))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ordinary_text_is_untouched() {
        let controls = ControlTokens::new(["<|im_end|>", "</s>"]);
        assert!(matches!(controls.escape("a < b, and </p> too."), Cow::Borrowed(_)));
        assert!(matches!(ControlTokens::default().escape("</s>"), Cow::Borrowed(_)));
    }

    proptest! {
        /// Whatever surrounds it, an escaped content contributes no control token, and it is the content.
        #[test]
        fn escaped_content_names_no_control_token(
            before in "[<|/s>a]{0,4}", content in "[<|/s>a]{1,12}", after in "[<|/s>a]{0,4}"
        ) {
            let texts = ["<|a|>", "<s>", "</s>", "<<"];
            let escaped = ControlTokens::new(texts).escape(&content).into_owned();
            prop_assert_eq!(escaped.replace(INERT, ""), content);
            let whole = format!("{before}{escaped}{after}");
            let inside = before.len()..before.len() + escaped.len();
            for text in texts {
                for (at, _) in whole.match_indices(text) {
                    prop_assert!(at >= inside.end || at + text.len() <= inside.start, "{whole:?} names {text}");
                }
            }
        }
    }
}
