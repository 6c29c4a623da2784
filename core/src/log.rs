//! One logging macro that is defmt's on a device and nothing elsewhere.

// defmt's own, not a macro around it: a record's source line is then the caller's.
#[cfg(feature = "defmt")]
pub(crate) use defmt::debug;

/// Only type-checks its arguments; `defmt::debug!` where the feature `defmt` is on.
#[cfg(not(feature = "defmt"))]
macro_rules! debug {
    ($format:literal $(, $value:expr)* $(,)?) => {{
        let _ = ($(&$value,)*);
    }};
}

#[cfg(not(feature = "defmt"))]
pub(crate) use debug;

/// Every public type can be logged: this list fails to build where one cannot. Types that hold values are derived; views
/// say how large they are and not what they hold, which may be a whole cache.
#[cfg(feature = "defmt")]
const _: () = {
    use crate::*;
    const fn logged<T: defmt::Format>() {}
    logged::<attend::KeyLanes<'_>>();
    logged::<attend::Queries<'_>>();
    logged::<attend::ValueRows<'_>>();
    logged::<Admission>();
    logged::<CacheBytes>();
    logged::<CachePlan>();
    logged::<ChannelMask>();
    logged::<channel::adaptive::Calibration<'_>>();
    logged::<channel::adaptive::Grid>();
    logged::<channel::compensate::Correction<'_>>();
    logged::<channel::dynamic::Bounds>();
    logged::<channel::dynamic::Load>();
    logged::<channel::dynamic::Reason>();
    logged::<channel::lowrank::Projection<'_>>();
    logged::<channel::select::TopT<8>>();
    logged::<Error>();
    logged::<fixed::FixedHead<64, 1>>();
    logged::<Head<64, 500>>();
    logged::<HeadLayout>();
    logged::<HeadMut<'_>>();
    logged::<HeadRef<'_>>();
    logged::<Lambda>();
    logged::<Partial<'_>>();
    logged::<Plain>();
    logged::<Policy>();
    logged::<policy::PolicyError>();
    logged::<quant::CodeKind>();
    logged::<quant::Groups<'_>>();
    logged::<QueryWindow<'_>>();
    logged::<Rows<'_>>();
    logged::<Span>();
    logged::<storage::FloatKind>();
    logged::<storage::Form>();
    logged::<StorageKind>();
    logged::<token::h2o::H2o>();
    logged::<token::snapkv::SnapKv>();
    logged::<token::window::Window>();
    logged::<TokenRows<'_>>();
    logged::<trace::Difference>();
    logged::<trace::Needs>();
    logged::<trace::Record<'_>>();
    logged::<trace::Replayed>();
    logged::<trace::TraceError>();
    logged::<trace::TraceHeader<'_>>();
    logged::<wire::CacheHeader>();
};
