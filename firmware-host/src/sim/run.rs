//! Runs a scenario.

use super::{
    Answer, Board, Broken, Check, Expect, LinkReport, Parts, PolicyReport, Report, Request, Sample, Scenario, SimError,
    Time, Weather,
    link::{self, Ask, Conversation, Pace, Scripted},
    shape,
};
use std::{path::Path, time::Duration};
use thinkey::{
    plan::{Planner, Size, Workload},
    policy::Calibration,
    weights::Checkpoint,
};
use thinkey_core::policy::{Choice, Policy};

/// Samples of the timeline that an answer leaves at most.
const SAMPLES: usize = 64;

/// Milliseconds that a line which works again has for whatever is left.
const PATIENCE: u64 = 60_000;

/// Runs `scenario`, whose files lie beside `home`. `progress` is told how many tokens of how many are through, of all
/// policies together.
///
/// # Errors
/// [`SimError`] where a file that it names cannot be read or a policy cannot be. What is not met is no error: the report
/// tells.
pub fn run(scenario: &Scenario, home: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<Report, SimError> {
    let board = Board::find(&scenario.board, home)?;
    let path = home.join(&scenario.model);
    if !scenario.model.ends_with(".toml") && path.exists() {
        let checkpoint = Checkpoint::open(&path)?;
        let calibration = Calibration::find(&checkpoint)?;
        let name = checkpoint.config().name.clone().unwrap_or_else(|| scenario.model.clone());
        return under_policies(
            scenario,
            board,
            name,
            &Planner::new(&checkpoint, calibration.as_ref()),
            calibration.is_some(),
            progress,
        );
    }
    let shape = shape(&scenario.model, home)?;
    let (config, weights) = shape.planned().map_err(|cause| SimError::Shape { model: shape.name.clone(), cause })?;
    under_policies(scenario, board, shape.name, &Planner::of(&config, weights, None), false, progress)
}

fn under_policies(
    scenario: &Scenario,
    board: Board,
    model: String,
    planner: &Planner<'_>,
    calibrated: bool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report, SimError> {
    let asked: usize = scenario.request.iter().map(|request| request.tokens).sum();
    let all = asked * scenario.policies.len();
    let mut policies = Vec::with_capacity(scenario.policies.len());
    for (number, policy) in scenario.policies.iter().enumerate() {
        let script = Script { scenario, board: &board, planner, policy, calibrated };
        policies.push(script.run(&mut |tokens| progress(number * asked + tokens, all))?);
    }
    let checks = scenario.expect.iter().flat_map(|expect| {
        let meant = move |report: &&PolicyReport| expect.policy.as_ref().is_none_or(|policy| *policy == report.policy);
        policies.iter().filter(meant).flat_map(move |report| check(expect, report))
    });
    // Expected of every link, whatever the line does.
    let links = policies.iter().filter_map(|report| {
        let LinkReport { lost, wrong, .. } = report.link?;
        let what = format!("{lost} requests lost and {wrong} wrong tokens over the link (none)");
        Some(Check { policy: report.policy.clone(), what, met: lost == 0 && wrong == 0 })
    });
    let checks = checks.chain(links).collect();
    Ok(Report { scenario: scenario.name.clone(), budget: Size(board.budget()), board, model, policies, checks })
}

/// A scenario under one policy.
struct Script<'a> {
    scenario: &'a Scenario,
    board: &'a Board,
    planner: &'a Planner<'a>,
    policy: &'a str,
    calibrated: bool,
}

impl Script<'_> {
    fn run(&self, progress: &mut dyn FnMut(usize)) -> Result<PolicyReport, SimError> {
        let Self { scenario, planner, policy, .. } = self;
        let design = |cause| SimError::Design { policy: (*policy).to_owned(), cause };
        let parsed: Policy =
            policy.parse().map_err(|cause| SimError::Policy { policy: (*policy).to_owned(), cause })?;
        let prompt = scenario.request.iter().map(|request| request.prompt).max();
        let mut workload = Workload {
            context: scenario.context,
            prompt,
            slots: 1,
            policy: match parsed.choice {
                Choice::Calibrated { lambda, .. } if !self.calibrated => {
                    Policy { choice: Choice::Top { lambda }, ..parsed }
                }
                _ => parsed,
            },
            recent: scenario.recent,
            window: scenario.window,
            threads: scenario.threads,
        };
        let budget = self.board.budget();
        workload.policy = planner.settle(&workload, budget as usize).map_err(design)?.0;
        let plan = planner.plan(&workload).map_err(design)?;
        let parts = Parts::from(&plan);
        let whole =
            planner.design(Policy::FULL).map_err(design)?.plan(1, scenario.context, scenario.recent).whole_bytes();
        let mut report = PolicyReport {
            policy: (*policy).to_owned(),
            planned: if workload.policy == parsed { (*policy).to_owned() } else { workload.policy.to_string() },
            parts,
            whole: Size(whole as u64),
            fits: parts.total.0 <= budget,
            longest: planner.longest_context(&workload, budget as usize),
            answers: Vec::new(),
            link: None,
            broken: Vec::new(),
            timeline: Vec::new(),
        };
        let mut clock = Duration::ZERO;
        let mut through = 0;
        for request in &scenario.request {
            clock = clock.max(request.at.0);
            let answer = self.answer(&workload, request, &mut clock, &mut report).map_err(design)?;
            report.answers.push(answer);
            through += request.tokens;
            progress(through);
        }
        if let Some(weather) = &scenario.link {
            report.link = Some(self.over_the_link(&workload, weather, report.parts.total.0));
        }
        Ok(report)
    }

    /// Has a host ask the script's requests over a line.
    fn over_the_link(&self, workload: &Workload, weather: &Weather, total: u64) -> LinkReport {
        let millis = |time: Time| u64::try_from(time.0.as_millis()).unwrap_or(u64::MAX);
        let mut random = fastrand::Rng::with_seed(self.scenario.seed);
        // The length of the text says how many tokens it has.
        let asks: Vec<Ask> = (self.scenario.request.iter())
            .map(|request| Ask {
                at: millis(request.at),
                prompt: (0..request.prompt).map(|_| random.u8(b' '..=b'~')).collect(),
                tokens: u32::try_from(request.tokens).unwrap_or(u32::MAX),
                cancel: request.cancel.and_then(|cancel| u32::try_from(cancel).ok()),
            })
            .collect();
        let pace = &Planned { script: self, workload, total };
        let alone: u64 = (self.scenario.request.iter())
            .map(|ask| pace.prompt(ask.prompt) + pace.step(ask.prompt + ask.tokens) * ask.tokens as u64)
            .sum();
        let last = asks.iter().map(|ask| ask.at).max().unwrap_or(0);
        let limit = weather.until.max(last).saturating_add(4 * alone).saturating_add(PATIENCE);
        let context = u32::try_from(self.scenario.context).unwrap_or(u32::MAX);
        let engine = &mut || Scripted::new(self.policy, context, None, pace);
        let told = link::converse(&asks, engine, weather, self.scenario.seed, limit);
        judged(&asks, &told)
    }

    /// Bytes that the system leaves at some time.
    fn budget(&self, at: Duration) -> u64 {
        let taken = self.scenario.shrink.iter().filter(|shrink| shrink.at.0 <= at).map(|shrink| shrink.by.0).sum();
        self.board.budget().saturating_sub(taken)
    }

    fn answer(
        &self,
        workload: &Workload,
        request: &Request,
        clock: &mut Duration,
        report: &mut PolicyReport,
    ) -> Result<Answer, thinkey::policy::DesignError> {
        let Self { planner, board, .. } = self;
        let asked = request.cancel.map_or(request.tokens, |cancel| cancel.min(request.tokens));
        let begun = *clock;
        let mut answer = Answer {
            prompt: request.prompt,
            tokens: 0,
            asked,
            at: Time(begun),
            first: Time::default(),
            step: Time::default(),
            restarts: 0,
        };
        let seconds = |bytes| Duration::from_secs_f64(board.seconds(bytes));
        let every = asked.div_ceil(SAMPLES).max(1);
        let mut done = 0;
        while done < asked {
            let held = request.prompt + done;
            // The first token takes the prompt, every other one a step.
            let took = match done {
                0 => seconds(planner.prompt_traffic(request.prompt)),
                _ => seconds(planner.step_traffic(workload, held)?),
            };
            let end = *clock + took;
            let cut = self.scenario.cut.iter().find(|cut| cut.at.0 > *clock && cut.at.0 <= end);
            if let Some(cut) = cut {
                *clock = cut.at.0 + cut.down.0;
                answer.restarts += 1;
                // What was told is told; the asker asks for the same again, and it comes out the same.
                done = 0;
                report.timeline.push(self.sample(workload, cut.at.0, 0, report.parts)?);
                continue;
            }
            let budget = self.budget(*clock);
            if report.parts.total.0 > budget {
                let broken = Broken { at: Time(*clock), needed: report.parts.total, budget: Size(budget) };
                report.broken.push(broken);
                break;
            }
            *clock = end;
            if done == 0 {
                answer.first = Time(end - begun);
            } else {
                answer.step = answer.step.max(Time(took));
            }
            if done % every == 0 {
                report.timeline.push(self.sample(workload, end, held, report.parts)?);
            }
            done += 1;
            answer.tokens = answer.tokens.max(done);
        }
        Ok(answer)
    }

    fn sample(
        &self,
        workload: &Workload,
        at: Duration,
        tokens: usize,
        parts: Parts,
    ) -> Result<Sample, thinkey::policy::DesignError> {
        let held = if tokens == 0 { 0 } else { self.planner.held(workload, tokens)? as u64 };
        let room = self.budget(at).saturating_sub(parts.total.0 - parts.cache.0);
        Ok(Sample { at: Time(at), tokens, held: Size(held), allocated: parts.cache, room: Size(room) })
    }
}

/// How a host's requests went, by what their answers have to be.
fn judged(asks: &[Ask], told: &Conversation) -> LinkReport {
    let mut report = LinkReport {
        answered: 0,
        failed: 0,
        lost: 0,
        tokens: 0,
        wrong: 0,
        restarts: told.restarts,
        damaged: told.damaged,
        resent: told.resent,
        over: told.over.map(|over| Time(Duration::from_millis(over))),
    };
    for (ask, heard) in asks.iter().zip(&told.heard) {
        let wanted = ask.cancel.map_or(ask.tokens, |cancel| cancel.min(ask.tokens)) as usize;
        let right = |&(index, &found): &(usize, &u32)| found == link::token(&ask.prompt, index);
        report.tokens += heard.tokens.len();
        report.wrong += heard.tokens.iter().enumerate().filter(|token| !right(token)).count();
        match (heard.ended, heard.failed) {
            (Some(_), Some(_)) => report.failed += 1,
            (Some(_), None) if heard.tokens.len() >= wanted => report.answered += 1,
            _ => report.lost += 1,
        }
    }
    report
}

/// The pace of a board, by the bytes that it reads.
struct Planned<'a> {
    script: &'a Script<'a>,
    workload: &'a Workload,
    total: u64,
}

impl Planned<'_> {
    fn millis(&self, bytes: usize) -> u64 {
        (self.script.board.seconds(bytes) * 1e3).ceil() as u64
    }
}

impl Pace for &Planned<'_> {
    fn prompt(&self, tokens: usize) -> u64 {
        self.millis(self.script.planner.prompt_traffic(tokens))
    }

    fn step(&self, tokens: usize) -> u64 {
        // A workload that was planned can be planned for fewer tokens.
        self.script.planner.step_traffic(self.workload, tokens).map_or(0, |bytes| self.millis(bytes))
    }

    fn fits(&self, now: u64) -> bool {
        self.total <= self.script.budget(Duration::from_millis(now))
    }
}

fn check(expect: &Expect, report: &PolicyReport) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut add = |what: String, met: bool| checks.push(Check { policy: report.policy.clone(), what, met });
    if let Some(fits) = expect.fits {
        let says = |fits| if fits { "fits" } else { "does not fit" };
        add(format!("{} (expected: {})", says(report.fits), says(fits)), report.fits == fits);
    }
    if let Some(most) = expect.cache {
        let cache = report.parts.cache;
        add(format!("a cache of {cache} (at most {most})"), cache <= most);
    }
    if let Some(least) = expect.tokens {
        let tokens = report.tokens();
        add(format!("{tokens} tokens (at least {least})"), tokens >= least);
    }
    // What did not come took forever.
    let answered = report.answers.iter().all(|answer| answer.tokens == answer.asked);
    for (what, most, of) in [
        ("a first token", expect.first, (|answer| answer.first) as fn(&Answer) -> Time),
        ("a token", expect.step, |answer| answer.step),
    ] {
        if let Some(most) = most {
            let longest = report.answers.iter().map(of).max().unwrap_or_default();
            let none = if answered { "" } else { ", and some never came" };
            add(format!("{longest} to {what}{none} (at most {most})"), answered && longest <= most);
        }
    }
    if let (Some(most), Some(link)) = (expect.over, report.link) {
        match link.over {
            Some(over) => add(format!("{over} until all was said (at most {most})"), over <= most),
            None => add(format!("not all was said (at most {most})"), false),
        }
    }
    if let Some(most) = expect.broken {
        let broken = report.broken.len();
        add(format!("{broken} limits broken (at most {most})"), broken <= most);
    }
    checks
}
