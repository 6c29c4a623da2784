//! Key energies of an admission from a random-sign [sketch](crate::channel::sketch), a row at a time: it takes no memory.

use super::{HeadMut, Rows, Steps};
use crate::{
    Error,
    channel::random::bits,
    storage::{Element, elements, with_element},
};

impl HeadMut<'_> {
    /// Writes what a sketch of `lines` rows makes of the energies of the `held` tokens of the ring and then `new` rows: as
    /// [`add`](crate::channel::sketch::add) with `seed` from token 0 on and
    /// [`energy`](crate::channel::sketch::energy).
    ///
    /// # Errors
    /// [`Error::Length`] where rows do not fit.
    pub(super) fn sketch_keys(
        &self,
        (seed, lines): (u64, usize),
        held: usize,
        rows: Rows<'_>,
        new: usize,
        energy: &mut [f32],
    ) -> Result<(), Error> {
        let (head_dim, stride) = (energy.len(), self.layout.ring_stride());
        rows.check(new, head_dim)?;
        let steps = Steps::keys(&rows, head_dim);
        energy.fill(0.0);
        with_element!(self.layout.keys.ring(), E => {
            let ring = elements::<E>(&self.bytes[self.layout.ring_keys(self.slot)])?;
            for line in 0..lines {
                let sign = |token: usize| if bits(seed, token as u64) >> line & 1 == 0 { 1.0 } else { -1.0 };
                for (channel, (energy, lanes)) in energy.iter_mut().zip(ring.chunks_exact(stride)).enumerate() {
                    let held_sum: f32 = lanes[..held].iter().enumerate().map(|(at, x)| sign(at) * x.load()).sum();
                    let new_sum: f32 =
                        (0..new).map(|token| sign(held + token) * rows.keys[steps.at(token, channel)]).sum();
                    *energy += (held_sum + new_sum) * (held_sum + new_sum) / lines as f32;
                }
            }
        });
        Ok(())
    }
}
