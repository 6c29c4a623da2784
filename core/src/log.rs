//! One logging macro that is defmt's on a device and nothing elsewhere.

/// `defmt::debug!` where the feature `defmt` is on; otherwise the arguments are only type-checked.
macro_rules! debug {
    ($format:literal $(, $value:expr)* $(,)?) => {{
        #[cfg(feature = "defmt")]
        ::defmt::debug!($format $(, $value)*);
        #[cfg(not(feature = "defmt"))]
        let _ = ($(&$value,)*);
    }};
}

pub(crate) use debug;
