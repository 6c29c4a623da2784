//! An HTML page.

use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
    table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}\
    td.text,th.text{text-align:left}figure{margin:2rem 0}figcaption{color:#555}svg{max-width:100%;height:auto}";

/// A page that grows downwards.
#[derive(Clone, Debug)]
pub struct Page {
    html: String,
}

/// `text` with the characters that HTML reads otherwise.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

impl Page {
    /// A page with a heading.
    #[must_use]
    pub fn new(title: &str) -> Self {
        let title = escape(title);
        Self {
            html: format!(
                "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>{title}</title>\
                 <style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
            ),
        }
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) {
        self.push(&["<p>", &escape(text), "</p>\n"]);
    }

    /// A table; cells that hold no number stand left.
    pub fn table(&mut self, head: &[&str], rows: impl Iterator<Item = Vec<String>>) {
        self.push(&["<table>\n"]);
        let cells = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
            cells.fold(String::from("<tr>"), |mut row, cell| {
                let number = cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
                let class = if number || cell.is_empty() { "" } else { " class=\"text\"" };
                // A string takes whatever is written.
                let _ = write!(row, "<{tag}{class}>{}</{tag}>", escape(cell));
                row
            })
        };
        self.push(&[&cells("th", &mut head.iter().copied()), "</tr>\n"]);
        for row in rows {
            self.push(&[&cells("td", &mut row.iter().map(String::as_str)), "</tr>\n"]);
        }
        self.push(&["</table>\n"]);
    }

    /// A plot, as SVG, and what it shows.
    pub fn figure(&mut self, caption: &str, svg: &str) {
        self.push(&["<figure>\n", svg, "\n<figcaption>", &escape(caption), "</figcaption>\n</figure>\n"]);
    }

    /// The whole page.
    #[must_use]
    pub fn finish(mut self) -> String {
        self.push(&["</body>\n</html>\n"]);
        self.html
    }

    fn push(&mut self, parts: &[&str]) {
        parts.iter().for_each(|part| self.html.push_str(part));
    }
}
