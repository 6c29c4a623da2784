//! λ of each layer, in fixed memory.

use crate::Lambda;
use core::fmt;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, SeqAccess, Visitor},
};

/// Most runs of layers of one λ each that a table holds.
pub const MAX_RUNS: usize = 32;

/// Most layers of a run. Layers beyond belong to the next.
const LONGEST: u8 = u8::MAX;

/// λ of each layer of a model, as runs of layers of one λ each: a table by hand, or what
/// [calibration](crate::channel::adaptive) makes of one budget.
///
/// In files it is a list of runs, `[layers, λ in per mille]` each. Neighbours of one λ are one run, however they were given,
/// so that tables that say the same are equal.
///
/// ```
/// use thinkey_core::{Lambda, policy::LayerTable};
/// let [few, many] = [250, 500].map(|per_mille| Lambda::from_per_mille(per_mille).unwrap());
/// let mut table = LayerTable::default();
/// table.push(2, few)?;
/// table.push(1, many)?;
/// assert_eq!(table.layers(), 3);
/// assert!(table.lambdas().eq([few, few, many]));
/// # Ok::<(), thinkey_core::policy::TableFull>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct LayerTable {
    /// Those beyond `len` are of no layer and of λ = 0.
    runs: [(u8, Lambda); MAX_RUNS],
    len: u8,
}

/// A table has no room for another run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct TableFull;

impl fmt::Display for TableFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a table of layers holds {MAX_RUNS} runs of one λ; give neighbours the same")
    }
}

impl core::error::Error for TableFull {}

impl Default for LayerTable {
    /// A table of no layers.
    fn default() -> Self {
        Self { runs: [(0, Lambda::WHOLE); MAX_RUNS], len: 0 }
    }
}

impl LayerTable {
    /// Appends `layers` layers of λ = `lambda`.
    ///
    /// # Errors
    /// [`TableFull`]; the table is unchanged then.
    pub fn push(&mut self, layers: u8, lambda: Lambda) -> Result<(), TableFull> {
        let (len, mut rest) = (usize::from(self.len), layers);
        if let Some((last, _)) = self.runs[..len].last_mut().filter(|(_, own)| *own == lambda) {
            let more = rest.min(LONGEST - *last);
            if more < rest && len == MAX_RUNS {
                return Err(TableFull);
            }
            *last += more;
            rest -= more;
        }
        if rest > 0 {
            *self.runs.get_mut(len).ok_or(TableFull)? = (rest, lambda);
            self.len += 1;
        }
        Ok(())
    }

    /// The runs: how many layers, and their λ.
    #[must_use]
    pub fn runs(&self) -> &[(u8, Lambda)] {
        &self.runs[..usize::from(self.len)]
    }

    /// λ of each layer, from the first.
    pub fn lambdas(&self) -> impl Iterator<Item = Lambda> {
        self.runs().iter().flat_map(|&(layers, lambda)| core::iter::repeat_n(lambda, layers.into()))
    }

    /// Layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.runs().iter().map(|&(layers, _)| usize::from(layers)).sum()
    }
}

impl fmt::Debug for LayerTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LayerTable").field(&self.runs()).finish()
    }
}

impl Serialize for LayerTable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.runs().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for LayerTable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Runs;

        impl<'de> Visitor<'de> for Runs {
            type Value = LayerTable;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_RUNS} runs of layers, [layers, λ in per mille] each")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut runs: A) -> Result<LayerTable, A::Error> {
                let mut table = LayerTable::default();
                while let Some((layers, lambda)) = runs.next_element()? {
                    table.push(layers, lambda).map_err(A::Error::custom)?;
                }
                Ok(table)
            }
        }

        deserializer.deserialize_seq(Runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn lambda(per_mille: u16) -> Lambda {
        Lambda::from_per_mille(per_mille).unwrap()
    }

    proptest! {
        /// Against a list of all layers.
        #[test]
        fn holds_what_was_pushed(runs in prop::collection::vec((any::<u8>(), 0u16..3), 0..80)) {
            let (mut table, mut all) = (LayerTable::default(), Vec::new());
            for (layers, per_mille) in runs {
                let before = table;
                match table.push(layers, lambda(per_mille)) {
                    Ok(()) => all.extend(std::iter::repeat_n(lambda(per_mille), layers.into())),
                    Err(TableFull) => {
                        prop_assert_eq!(table, before);
                        prop_assert_eq!(table.runs().len(), MAX_RUNS);
                    }
                }
            }
            prop_assert_eq!(table.layers(), all.len());
            prop_assert!(table.lambdas().eq(all.iter().copied()));
            prop_assert!(table.runs().iter().all(|&(layers, _)| layers > 0));
            prop_assert!(table.runs().windows(2).all(|pair| pair[0].1 != pair[1].1 || pair[0].0 == LONGEST));
            // One layer after the other is the same table.
            let mut single = LayerTable::default();
            all.iter().for_each(|&lambda| single.push(1, lambda).unwrap());
            prop_assert_eq!(single, table);
        }
    }

    #[test]
    fn a_full_table_takes_what_needs_no_run() {
        let mut table = LayerTable::default();
        (0..MAX_RUNS as u16).for_each(|at| table.push(200, lambda(at)).unwrap());
        let last = lambda(MAX_RUNS as u16 - 1);
        assert_eq!((table.push(56, last), table.push(1, lambda(999))), (Err(TableFull), Err(TableFull)));
        assert_eq!((table.push(55, last), table.push(0, lambda(999))), (Ok(()), Ok(())));
        assert_eq!(table.layers(), MAX_RUNS * 200 + 55);
    }
}
