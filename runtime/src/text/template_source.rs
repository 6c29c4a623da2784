//! The chat template that comes with a model, as it stands there.

use super::{TextError, folder};
use crate::weights::TokenizerSource;

/// A chat template and where it is from. To render it, take [`Tokenizer::chat_template`](super::Tokenizer::chat_template).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateSource {
    /// GGUF key or file of the folder that holds it.
    pub from: &'static str,
    /// The template (Jinja), unchanged.
    pub text: String,
}

impl TemplateSource {
    /// The template of the model with this tokenizer, if it has one.
    ///
    /// # Errors
    /// [`TextError::Read`] or [`TextError::Json`] where the file that may hold it is unreadable.
    pub fn of(source: &TokenizerSource) -> Result<Option<Self>, TextError> {
        match source {
            TokenizerSource::Gguf(gguf) => {
                Ok(gguf.chat_template.clone().map(|text| Self { from: "tokenizer.chat_template", text }))
            }
            TokenizerSource::Folder(path) => folder::template(path),
        }
    }
}
