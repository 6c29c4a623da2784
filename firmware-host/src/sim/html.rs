//! A report as one file.

use super::{PolicyReport, Report, SimError};
use thinkey::{
    eval::html::{Line, Page, Point, lines},
    plan::Size,
};

/// The report as an HTML page with nothing to be fetched: memory by policy, what was expected, and the cache over time.
///
/// # Errors
/// [`SimError::Plot`] where a plot cannot be drawn.
pub fn page(report: &Report) -> Result<String, SimError> {
    let mut page = Page::new(&report.scenario);
    page.text(&format!(
        "{} on {}: {} of {} are left by the system; memory is read at {} GB/s. Times are estimated from below, by the bytes that \
         have to be read.",
        report.model, report.board.name, report.budget, report.board.memory, report.board.bandwidth,
    ));
    let rows = report.policies.iter().map(|policy| {
        let parts = policy.parts;
        let mut row = vec![policy.policy.clone()];
        row.extend(
            [parts.weights, parts.cache, policy.whole, parts.buffers, parts.total].map(|bytes| bytes.to_string()),
        );
        row.push(if policy.fits { "fits" } else { "does not fit" }.to_owned());
        row.push(policy.longest.map_or_else(String::new, |tokens| tokens.to_string()));
        row.push(policy.tokens().to_string());
        row
    });
    let head =
        ["policy", "weights", "cache", "whole cache", "buffers", "together", "", "longest context", "tokens answered"];
    page.table(&head, rows);
    let checks = report.checks.iter().map(|check| {
        vec![check.policy.clone(), check.what.clone(), if check.met { "met" } else { "NOT MET" }.to_owned()]
    });
    if !report.checks.is_empty() {
        page.table(&["policy", "what came out", ""], checks);
    }
    for policy in report.policies.iter().filter(|policy| policy.timeline.len() > 1) {
        let caption = format!(
            "{}: the cache over time, against what is allocated and what the board has room for beside the rest.",
            policy.policy
        );
        page.figure(&caption, &timeline(policy)?);
    }
    Ok(page.finish())
}

fn timeline(policy: &PolicyReport) -> Result<String, SimError> {
    let line = |name: &str, of: fn(&super::Sample) -> Size| Line {
        name: name.to_owned(),
        points: policy
            .timeline
            .iter()
            .map(|sample| Point {
                x: sample.at.0.as_secs_f64(),
                y: of(sample).0 as f64 / (1 << 20) as f64,
                error: None,
                label: String::new(),
            })
            .collect(),
    };
    let drawn = [
        line("held", |sample| sample.held),
        line("allocated", |sample| sample.allocated),
        line("room", |sample| sample.room),
    ];
    Ok(lines(["seconds", "MiB"], None, &drawn)?)
}
