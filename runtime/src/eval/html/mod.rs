//! Reports as one file: tables and plots, with nothing to be fetched.

mod charts;
mod page;

use super::{
    EvalError,
    energy::{self, EnergyReport},
    perplexity::{PLANNED, PerplexityReport, PolicyRow},
    retrieval::RetrievalReport,
    stats::Estimate,
};
use charts::{Bars, Heat};
pub use charts::{Line, Point, lines};
pub use page::Page;
use thinkey_core::{
    Lambda,
    policy::{Choice, Policy},
};

/// A mean with its error, to so many decimals.
fn within(estimate: Estimate, decimals: usize) -> String {
    let Estimate { mean, error } = estimate;
    match error {
        Some(error) => format!("{mean:.decimals$} ± {error:.decimals$}"),
        None => format!("{mean:.decimals$}"),
    }
}

/// Perplexity and divergence by policy: a table, the frontier of divergence against bytes, and perplexity by λ.
///
/// # Errors
/// [`EvalError::Plot`] where a plot cannot be drawn.
pub fn perplexity(model: &str, report: &PerplexityReport) -> Result<String, EvalError> {
    let mut page = Page::new(&format!("{model}: policies side by side"));
    page.text(&format!(
        "{} windows of a text of {} tokens: {} tokens are read as a prompt, then {} next tokens predicted over the cache of \
         each policy. Errors are standard errors over windows; differences are of the same windows. Divergence is \
         KL(first policy ‖ policy) in nats a token, bytes are planned for {PLANNED} tokens.",
        report.options.windows, report.text, report.options.prefix, report.options.predict,
    ));
    let head = [
        "",
        "policy",
        "perplexity",
        "more than 1",
        "divergence",
        "same likeliest",
        "bytes a token",
        "of f16",
        "decode/s",
    ];
    let rows = report.policies.iter().enumerate().map(|(at, row)| {
        let [.., planned] = row.planned;
        vec![
            (at + 1).to_string(),
            row.policy.to_string(),
            within(row.perplexity, 3),
            within(row.excess, 3),
            within(row.divergence, 5),
            format!("{:.2}%", 100.0 * row.agreement.mean),
            format!("{:.0}", planned.per_token),
            format!("{:.1}%", 100.0 * planned.share),
            format!("{:.0}", row.decode_rate),
        ]
    });
    page.table(&head, rows);

    let points: Vec<_> = report
        .policies
        .iter()
        .enumerate()
        .filter(|(_, row)| row.divergence.mean > 0.0)
        .map(|(at, row)| Point {
            x: row.planned[1].per_token,
            y: row.divergence.mean,
            error: row.divergence.error,
            label: (at + 1).to_string(),
        })
        .collect();
    if !points.is_empty() {
        let axes = ["bytes a token", "divergence in nats a token"];
        page.figure(
            "What bytes buy: further left is smaller, further down is nearer to the first policy, which is not shown. The grey line \
                       joins the policies that no other beats in both.",
            &charts::frontier(axes, &points)?,
        );
    }
    let lines = by_lambda(&report.policies);
    if !lines.is_empty() {
        let base = report.policies.first().map(|row| row.perplexity.mean);
        let caption = "Perplexity by the share of key channels pruned; the grey line is the first policy, and errors are \
                       of the difference to it.";
        page.figure(caption, &charts::lines(["λ", "perplexity"], base, &lines)?);
    }
    Ok(page.finish())
}

/// Policies that differ in nothing but λ, as lines; those that have no such company are none.
fn by_lambda(rows: &[PolicyRow]) -> Vec<Line> {
    let mut groups: Vec<(Policy, Line)> = Vec::new();
    for row in rows {
        let Some(lambda) = row.lambda else { continue };
        let same = Policy { choice: without_lambda(row.policy.choice), ..row.policy };
        let point = Point { x: lambda, y: row.perplexity.mean, error: row.excess.error, label: String::new() };
        match groups.iter_mut().find(|(policy, _)| *policy == same) {
            Some((_, line)) => line.points.push(point),
            None => groups.push((same, Line { name: same.to_string().replace("(0", "(λ"), points: vec![point] })),
        }
    }
    let mut lines: Vec<_> = groups.into_iter().map(|(_, line)| line).filter(|line| line.points.len() > 1).collect();
    lines.iter_mut().for_each(|line| line.points.sort_by(|a, b| a.x.total_cmp(&b.x)));
    lines
}

fn without_lambda(mut choice: Choice) -> Choice {
    if let Choice::Top { lambda } | Choice::Adaptive { lambda, .. } | Choice::Calibrated { lambda, .. } = &mut choice {
        *lambda = Lambda::WHOLE;
    }
    choice
}

/// What was found, as a table and a heat map a policy.
///
/// # Errors
/// As [`perplexity`].
pub fn retrieval(model: &str, test: &str, report: &RetrievalReport) -> Result<String, EvalError> {
    let mut page = Page::new(&format!("{model}: {test}"));
    page.text(&format!(
        "A number is told once and asked for at the end, in {} prompts of each length and depth (0% is the beginning).",
        report.options.trials
    ));
    let rows = report.policies.iter().map(|row| {
        let share = 100.0 * row.total as f64 / row.asked as f64;
        vec![row.policy.to_string(), format!("{} of {}", row.total, row.asked), format!("{share:.0}%")]
    });
    page.table(&["policy", "found", ""], rows);
    let columns: Vec<_> = report.options.lengths.iter().map(usize::to_string).collect();
    let depths: Vec<_> = report.options.depths.iter().map(|depth| format!("{depth}%")).collect();
    for row in &report.policies {
        let share = |&found: &usize| found as f64 / report.options.trials as f64;
        let values: Vec<Vec<_>> = row.found.iter().map(|line| line.iter().map(share).collect()).collect();
        let heat = Heat { axes: ["tokens", "depth"], columns: &columns, rows: &depths, values: &values };
        page.figure(&row.policy.to_string(), &charts::heat(&heat)?);
    }
    Ok(page.finish())
}

/// Ranks, skew and overlap: means, and bars by layer.
///
/// # Errors
/// As [`perplexity`].
pub fn energy(model: &str, report: &EnergyReport) -> Result<String, EvalError> {
    let mut page = Page::new(&format!("{model}: where the energy is"));
    page.text(&format!(
        "{} prompts of {} tokens; the newest {} queries score. A rank is how many of {} directions hold {:.0}% of the energy. \
         Masks prune λ = {}.",
        report.windows,
        report.tokens,
        report.window,
        report.head_dim,
        100.0 * energy::SHARE,
        report.lambda,
    ));
    let rows = report.heads.iter().map(|head| {
        let share = |share: Option<f64>| share.map_or(String::new(), |share| format!("{:.1}%", 100.0 * share));
        let skew = head.skew.map(|skew| share(Some(skew.mean)));
        let ranks = [head.logit_rank, head.centred_rank, head.key_rank].map(|rank| within(rank, 1));
        let own = [head.layer.to_string(), head.head.to_string()];
        own.into_iter().chain(ranks).chain(skew).chain([share(head.overlap), share(head.jaccard)]).collect()
    });
    let layers = report.heads.iter().map(|head| head.layer + 1).max().unwrap_or(0);
    let names: Vec<_> = (0..layers).map(|layer| layer.to_string()).collect();
    let mean = |of: &dyn Fn(&energy::HeadEnergy) -> f64| -> Vec<f64> {
        let layer = |layer| report.heads.iter().filter(move |head| head.layer == layer).map(of).collect::<Vec<_>>();
        (0..layers).map(|index| Estimate::of(&layer(index)).mean).collect()
    };
    let ranks = [
        ("logits", mean(&|head| head.logit_rank.mean)),
        ("logits, centred", mean(&|head| head.centred_rank.mean)),
        ("keys", mean(&|head| head.key_rank.mean)),
    ];
    let shares: Vec<_> = energy::BEST
        .iter()
        .enumerate()
        .map(|(at, best)| (format!("best {best}%"), mean(&|head| head.skew[at].mean)))
        .collect();
    let shares: Vec<_> = shares.iter().map(|(name, values)| (name.as_str(), values.clone())).collect();
    page.figure(
        "Rank by layer, mean over KV heads.",
        &charts::bars(&Bars { axes: ["layer", "directions"], names: &names, series: &ranks })?,
    );
    let bars = Bars { axes: ["layer", "share of the score"], names: &names, series: &shares };
    page.figure("Share of the channel scores that the best channels hold.", &charts::bars(&bars)?);
    if report.heads.iter().all(|head| head.overlap.is_some()) {
        let overlap = [("in both", mean(&|head| head.overlap.unwrap_or_default()))];
        let bars = Bars { axes: ["layer", "share of the mask"], names: &names, series: &overlap };
        page.figure("Channels that the masks of two prompts have in common.", &charts::bars(&bars)?);
    }
    let [few, some, half] = energy::BEST.map(|best| format!("best {best}%"));
    page.table(
        &["layer", "head", "rank of logits", "centred", "rank of keys", &few, &some, &half, "overlap", "Jaccard"],
        rows,
    );
    if !report.scoring.scores.is_empty() {
        scores(&mut page, report)?;
    }
    Ok(page.finish())
}

/// Scores beside the exact one: a table, and how much of its masks they find by layer.
fn scores(page: &mut Page, report: &EnergyReport) -> Result<(), EvalError> {
    let (scoring, heads) = (&report.scoring, report.heads.len());
    page.text(&format!(
        "Scores beside the exact one (query): the share of its mask that theirs has too, the share of what its mask holds of its \
         score that theirs holds, and the time for all {heads} heads, one after the other on one thread. A prompt is read in \
         {:.0} ms.",
        scoring.reading_milliseconds,
    ));
    let milliseconds = |microseconds: f64| format!("{:.2}", microseconds * heads as f64 / 1e3);
    let exact = ["query", "100%", "100%", &milliseconds(scoring.microseconds), "1.000"].map(String::from).to_vec();
    let share =
        |share: Estimate| within(Estimate { mean: 100.0 * share.mean, error: share.error.map(|x| 100.0 * x) }, 1) + "%";
    let rows = scoring.scores.iter().map(|row| {
        let own = [row.score.to_string(), share(row.overlap), share(row.held)];
        own.into_iter().chain([milliseconds(row.microseconds), format!("{:.3}", row.faster)]).collect()
    });
    page.table(&["score", "overlap", "score held", "ms", "times as fast"], [exact].into_iter().chain(rows));
    let lines = scoring.scores.iter().map(|row| Line {
        name: row.score.to_string(),
        points: (0u16..)
            .zip(&row.layers)
            .map(|(layer, &y)| Point { x: layer.into(), y, error: None, label: String::new() })
            .collect(),
    });
    let plot = charts::lines(["layer", "share of the mask"], None, &lines.collect::<Vec<_>>())?;
    page.figure("Channels of the exact mask that the mask of another score has too.", &plot);
    Ok(())
}

#[cfg(test)]
mod tests;
