//! Reports of made-up numbers.

use super::*;
use crate::eval::{
    Footprint,
    energy::{HeadEnergy, ScoreReport, ScoreRow},
    perplexity::PerplexityOptions,
    retrieval::{RetrievalOptions, RetrievalRow},
};

const ONE: Estimate = Estimate { mean: 1.0, error: Some(0.25) };

fn row(line: &str, perplexity: f64, divergence: f64) -> PolicyRow {
    let policy: Policy = line.parse().unwrap();
    let footprint = |tokens| Footprint { tokens, bytes: 100 * tokens, per_token: 100.0, share: 0.5 };
    PolicyRow {
        policy,
        lambda: policy.choice.lambda().map(|lambda| f64::from(lambda.per_mille()) / 1000.0),
        perplexity: Estimate { mean: perplexity, error: Some(0.1) },
        excess: ONE,
        divergence: Estimate { mean: divergence, error: None },
        agreement: ONE,
        allocated: footprint(300),
        planned: [footprint(200), footprint(PLANNED)],
        decode_rate: 50.0,
    }
}

fn perplexities(policies: Vec<PolicyRow>) -> String {
    let options = PerplexityOptions { prefix: 200, predict: 100, windows: 4 };
    perplexity("<model>", &PerplexityReport { options, text: 5000, policies }).unwrap()
}

/// One file of nothing but itself: no script, no address that would be fetched.
fn check(html: &str, plots: usize) {
    assert_eq!(html.matches("<svg ").count(), plots);
    assert_eq!(html.matches("</svg>").count(), plots);
    assert!(html.starts_with("<!DOCTYPE html>") && html.ends_with("</html>\n"));
    for word in ["<script", "src=", "href=", "url(", "@import", "NaN", "inf\""] {
        assert!(!html.contains(word), "{word}");
    }
    assert!(html.replace("http://www.w3.org/2000/svg", "").find("http").is_none());
}

#[test]
fn policies_are_plotted_by_bytes_and_by_lambda() {
    let html = perplexities(vec![
        row("full", 14.0, 0.0),
        row("choice=top(.7),keys=int4", 16.0, 0.2),
        row("choice=top(.4),keys=int4", 14.5, 0.02),
        row("keys=int8", 14.01, 1e-5),
        row("choice=top(.5)", 15.0, 0.1),
    ]);
    check(&html, 2);
    assert!(html.contains("<title>&lt;model&gt;: policies side by side</title>"));
    assert!(html.contains("<td>2</td><td class=\"text\">choice=top(.7),keys=int4</td><td>16.000 ± 0.100</td>"));
    assert!(html.contains("choice=top(λ),keys=int4"), "the line is named");
}

#[test]
fn what_has_no_points_has_no_plot() {
    check(&perplexities(vec![row("full", 14.0, 0.0)]), 0);
    check(&perplexities(vec![row("full", 14.0, 0.0), row("keys=int4", 14.1, 0.01)]), 1);
}

#[test]
fn every_policy_has_a_heat_map() {
    let row = |line: &str, found: [[usize; 2]; 3]| RetrievalRow {
        policy: line.parse().unwrap(),
        found: found.map(Vec::from).to_vec(),
        total: found.iter().flatten().sum(),
        asked: 24,
    };
    let options = RetrievalOptions { lengths: vec![512, 1024], depths: vec![0, 50, 100], trials: 4, seed: 0 };
    let policies = vec![row("full", [[4, 4], [4, 3], [4, 4]]), row("think", [[0, 1], [2, 0], [0, 0]])];
    let html = retrieval("m", "passkey", &RetrievalReport { options, policies }).unwrap();
    check(&html, 2);
    for text in ["23 of 24", "96%", "75%", "1024", "3 of 24"] {
        assert!(html.contains(text), "{text}");
    }
}

#[test]
fn heads_are_listed_and_layers_plotted() {
    let head = |layer, head, overlap| HeadEnergy {
        layer,
        head,
        logit_rank: ONE,
        centred_rank: ONE,
        key_rank: ONE,
        skew: [ONE; 3],
        overlap,
        jaccard: overlap,
    };
    let scoring = ScoreReport { microseconds: 20.0, reading_milliseconds: 500.0, scores: Vec::new() };
    let report = |overlap| EnergyReport {
        scoring: scoring.clone(),
        tokens: 100,
        windows: 3,
        window: 32,
        lambda: 0.5,
        head_dim: 16,
        heads: vec![head(0, 0, overlap), head(0, 1, overlap), head(1, 0, overlap)],
    };
    let html = energy("m", &report(Some(0.625))).unwrap();
    check(&html, 3);
    assert_eq!(html.matches("<td>62.5%</td>").count(), 6);
    check(&energy("m", &report(None)).unwrap(), 2);

    let score = ScoreRow {
        score: "sample(256)".parse().unwrap(),
        overlap: Estimate { mean: 0.75, error: Some(0.01) },
        held: Estimate { mean: 0.9, error: None },
        layers: vec![0.7, 0.8],
        microseconds: 40.0,
        faster: 0.5,
    };
    let mut compared = report(Some(0.625));
    compared.scoring.scores.push(score);
    let html = energy("m", &compared).unwrap();
    check(&html, 4);
    // Three heads.
    let row = "<td class=\"text\">sample(256)</td><td>75.0 ± 1.0%</td><td>90.0%</td><td>0.12</td><td>0.500</td>";
    assert!(html.contains(row) && html.contains("<td>0.06</td><td>1.000</td>"), "{html}");
}
