//! What fits a budget. More tokens and more sequences take more memory, so that the most is found by halving. More channels
//! do not always (short contexts are mostly corrections, which are largest in the middle), so that all numbers of channels
//! are tried.

use super::{Planner, Workload};
use crate::policy::DesignError;
use std::{cell::Cell, ops::RangeInclusive};
use thinkey_core::{
    Error, Lambda, Policy,
    channel::dynamic::{self, Bounds, Load, Reason},
    policy::Choice,
};

impl Planner<'_> {
    /// Whether `workload` fits `budget` bytes. One that cannot be planned does not.
    #[must_use]
    pub fn fits(&self, workload: &Workload, budget: usize) -> bool {
        self.plan(workload).is_ok_and(|plan| plan.total() <= budget)
    }

    /// The longest context, at most the model's, with which `workload` fits `budget` bytes; a longer prompt is cut to it.
    #[must_use]
    pub fn longest_context(&self, workload: &Workload, budget: usize) -> Option<usize> {
        largest(1..=self.config().context, |context| self.fits(&Workload { context, ..*workload }, budget))
    }

    /// The most sequences with which `workload` fits `budget` bytes.
    #[must_use]
    pub fn largest_batch(&self, workload: &Workload, budget: usize) -> Option<usize> {
        largest(1..=usize::from(u16::MAX), |slots| self.fits(&Workload { slots, ..*workload }, budget))
    }

    /// The smallest λ with which `workload` fits `budget` bytes: that which prunes least.
    #[must_use]
    pub fn smallest_lambda(&self, workload: &Workload, budget: usize) -> Option<Lambda> {
        let at = |lambda| Some(Workload { policy: workload.policy.with_lambda(lambda).ok()?, ..*workload });
        self.lambdas().find(|&lambda| at(lambda).is_some_and(|workload| self.fits(&workload, budget)))
    }

    /// The policy of `workload`, whose λ is settled where it is to come from what is free: the smallest with which everything
    /// fits `budget` bytes, within the bounds of `choice=dynamic`, and why it is that.
    ///
    /// # Errors
    /// As [`plan`](Self::plan).
    pub fn settle(
        &self,
        workload: &Workload,
        budget: usize,
    ) -> Result<(Policy, Option<(Lambda, Reason)>), DesignError> {
        let Choice::Dynamic { least, most } = workload.policy.choice else { return Ok((workload.policy, None)) };
        let top = Policy { choice: Choice::Top { lambda: most }, ..workload.policy };
        let load = Load { free: budget as u64, tokens: workload.context, sequences: workload.slots };
        let refused = Cell::new(None);
        let settled = dynamic::fit(Bounds { least, most }, load, |lambda, context, slots| {
            let plan = top.with_lambda(lambda).map_err(DesignError::from);
            let plan = plan.and_then(|policy| self.plan(&Workload { policy, context, slots, ..*workload }));
            plan.map(|plan| plan.total() as u64).map_err(|error| {
                refused.set(Some(error));
                Error::Inconsistent { what: "policy" }
            })
        });
        match (settled, refused.into_inner()) {
            (Ok((lambda, reason)), _) => Ok((top.with_lambda(lambda)?, Some((lambda, reason)))),
            (Err(_), Some(error)) => Err(error),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// The largest λ at which `policy` can be.
    #[must_use]
    pub fn largest_lambda(&self, policy: Policy) -> Option<Lambda> {
        let can_be = |lambda: &Lambda| policy.with_lambda(*lambda).is_ok_and(|policy| self.design(policy).is_ok());
        self.lambdas().filter(can_be).last()
    }

    /// Every λ that makes a difference, rising: 0, and of the others the least of those that keep as many channels.
    fn lambdas(&self) -> impl Iterator<Item = Lambda> {
        let (head_dim, mut last) = (self.config().head_dim, None);
        (0..1000).filter_map(|per_mille| Lambda::from_per_mille(per_mille).ok()).filter(move |&lambda| {
            let this = Some((lambda == Lambda::WHOLE, lambda.kept(head_dim)));
            std::mem::replace(&mut last, this) != this
        })
    }
}

/// The largest number of `range` that `fits`, which holds up to some number and for none beyond.
fn largest(range: RangeInclusive<usize>, fits: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut least, mut most) = range.into_inner();
    if !fits(least) {
        return None;
    }
    // `least` fits, and nothing above `most` does.
    while least < most {
        let middle = most - (most - least) / 2;
        if fits(middle) {
            least = middle;
        } else {
            most = middle - 1;
        }
    }
    Some(least)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{Checkpoint, fixture};
    use bytes::Bytes;
    use std::path::Path;

    #[test]
    fn the_largest_of_a_range() {
        for limit in 0..12 {
            let expected = (3..=9).filter(|&number| number <= limit).max();
            assert_eq!(largest(3..=9, |number| number <= limit), expected);
        }
    }

    fn checkpoint() -> Checkpoint {
        let file = fixture::gguf(&fixture::config(crate::model::Architecture::Llama)).to_bytes();
        Checkpoint::from_gguf(Path::new("tiny.gguf"), Bytes::from(file)).unwrap()
    }

    const WORKLOAD: Workload =
        Workload { context: 100, prompt: None, slots: 2, policy: Policy::FULL, recent: 32, window: 32, threads: 2 };

    fn at(policy: Policy, per_mille: u16) -> Workload {
        let policy = policy.with_lambda(Lambda::from_per_mille(per_mille).unwrap()).unwrap();
        Workload { policy, ..WORKLOAD }
    }

    /// Every number is the best: by trying all.
    #[test]
    fn searches_find_what_trying_everything_finds() {
        let checkpoint = checkpoint();
        let planner = Planner::new(&checkpoint, None);
        let total = |workload: Workload| planner.plan(&workload).unwrap().total();
        let (least, most) =
            (total(Workload { context: 1, slots: 1, ..WORKLOAD }), total(Workload { context: 128, ..WORKLOAD }));
        for budget in (least - 1000..most + 1000).step_by(1777) {
            let fits = |workload| total(workload) <= budget;
            let context = (1..=128).filter(|&context| fits(Workload { context, ..WORKLOAD })).max();
            assert_eq!(planner.longest_context(&WORKLOAD, budget), context);
            let slots = (1..=50).filter(|&slots| fits(Workload { slots, ..WORKLOAD })).max();
            assert_eq!(planner.largest_batch(&WORKLOAD, budget), slots);
            for fix in ["none", "compensated"] {
                let policy = format!("think,fix={fix}").parse().unwrap();
                let lambda = (0..1000).find(|&per_mille| fits(at(policy, per_mille)));
                let found = planner.smallest_lambda(&Workload { policy, ..WORKLOAD }, budget);
                assert_eq!(found.map(Lambda::per_mille), lambda);
            }
        }
    }

    /// Halving needs it.
    #[test]
    fn more_of_anything_takes_no_less() {
        let checkpoint = checkpoint();
        let planner = Planner::new(&checkpoint, None);
        for threads in [1, 2, 5] {
            for prompt in [None, Some(40)] {
                let start = Workload { threads, prompt, ..WORKLOAD };
                let total = |workload: Workload| planner.plan(&workload).unwrap().total();
                let rising = |totals: Vec<usize>| assert!(totals.is_sorted(), "{totals:?}");
                rising((1..300).map(|context| total(Workload { context, ..start })).collect());
                rising((1..60).map(|slots| total(Workload { slots, ..start })).collect());
                let thin = |per_mille| Workload { threads, prompt, ..at(Policy::FULL, per_mille) };
                rising((0..1000).rev().map(|per_mille| total(thin(per_mille))).collect());
            }
        }
    }

    #[test]
    fn a_dynamic_policy_takes_the_smallest_lambda_that_fits() {
        let checkpoint = checkpoint();
        let planner = Planner::new(&checkpoint, None);
        let dynamic = Workload { policy: "choice=dynamic(.1,.8)".parse().unwrap(), ..WORKLOAD };
        assert_eq!(planner.settle(&WORKLOAD, 0), Ok((WORKLOAD.policy, None)));
        let total = |per_mille| planner.plan(&at(Policy::FULL, per_mille)).unwrap().total();
        for budget in (total(800) - 500..total(100) + 500).step_by(97) {
            let (policy, settled) = planner.settle(&dynamic, budget).unwrap();
            let (lambda, reason) = settled.unwrap();
            let expected = (100..=800).find(|&per_mille| total(per_mille) <= budget);
            assert_eq!(lambda.per_mille(), expected.unwrap_or(800));
            assert_eq!(policy, Policy::FULL.with_lambda(lambda).unwrap());
            assert_eq!(reason == Reason::TooLarge, expected.is_none());
            assert_eq!(reason == Reason::Fits, lambda.per_mille() == 100);
        }
    }

    #[test]
    fn what_cannot_be_planned_fits_nothing() {
        let checkpoint = checkpoint();
        let planner = Planner::new(&checkpoint, None);
        let workload = Workload { recent: 5000, ..WORKLOAD };
        assert!(planner.plan(&workload).is_err());
        assert!(!planner.fits(&workload, usize::MAX));
        assert_eq!(planner.longest_context(&workload, usize::MAX), None);
        assert_eq!(planner.longest_context(&WORKLOAD, usize::MAX), Some(128));
        assert_eq!(planner.smallest_lambda(&WORKLOAD, 0), None);
    }
}
