//! Progress bars: on standard error, and only where that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `len` layers, named by what is done to them.
pub fn layers(what: &'static str, len: usize) -> ProgressBar {
    ProgressBar::new(len as u64).with_message(what).with_style(style("{msg} {bar:30} {pos}/{len} layers {eta}"))
}

/// A bar over `len` of something; a message says what is done to them.
pub fn counted(unit: &'static str, len: usize) -> ProgressBar {
    let template = format!("{{msg}} {{bar:30}} {{pos}}/{{len}} {unit} {{eta}}");
    ProgressBar::new(len as u64).with_style(style(&template))
}

/// A bar for bytes whose number is not known yet.
pub fn bytes() -> ProgressBar {
    ProgressBar::no_length().with_style(style("{spinner} {msg} {bytes}"))
}

/// A spinner that says what is under way.
pub fn spinner() -> ProgressBar {
    ProgressBar::new_spinner().with_style(style("{spinner} {msg}"))
}

/// The style of a bar.
pub fn style(template: &str) -> ProgressStyle {
    // The templates are constants; a wrong one would show as the default bar.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
