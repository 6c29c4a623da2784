//! How much two masks agree.

use crate::{ChannelMask, Error, error::check_len};

/// The share of channels that both masks keep, of those that the larger one keeps: 1 where they are the same, 0 where
/// nothing is common.
///
/// # Errors
/// [`Error::Length`] for masks of heads of different size.
pub fn overlap(a: &ChannelMask, b: &ChannelMask) -> Result<f32, Error> {
    check_len("mask", a.head_dim(), b.head_dim())?;
    let common = a.channels().filter(|&channel| b.contains(channel)).count();
    Ok(common as f32 / a.kept().max(b.kept()) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_both_keep() {
        let mask = |channels: &[usize]| ChannelMask::from_channels(100, channels.iter().copied()).unwrap();
        let (a, b) = (mask(&[0, 31, 32, 99]), mask(&[31, 99]));
        assert_eq!((overlap(&a, &b), overlap(&b, &a), overlap(&a, &a)), (Ok(0.5), Ok(0.5), Ok(1.0)));
        assert_eq!(overlap(&mask(&[1]), &mask(&[2])), Ok(0.0));
        assert!(overlap(&a, &ChannelMask::whole(64).unwrap()).is_err());
    }
}
