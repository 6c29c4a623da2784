//! One head's cache on a fixed-size arena: what a device without an allocator declares as a `static`.
//!
//! ```
//! use thinkey_core::{attend, fixed::FixedHead, Head, HeadLayout, KeyOrder, Plain, Rows, StorageKind};
//!
//! // 64 channels, λ = 0.5, 32 recent tokens, room for 4 blocks: all sizes are constants.
//! const LAYOUT: HeadLayout = HeadLayout::of::<Head<64, 500>>(32, 4, StorageKind::F16, StorageKind::F16);
//! let mut head = FixedHead::<{ LAYOUT.bytes() }, 4>::new(LAYOUT)?;
//!
//! let (keys, values, query) = ([0.5; 100 * 64], [2.0; 100 * 64], [0.1; 64]);
//! head.admit(&query, Rows { keys: &keys, order: KeyOrder::Rows, values: &values, stride: 64 }, 100, true)?;
//! assert_eq!((head.span().prefix(), head.span().recent), (68, 32));
//!
//! let (mut memory, mut out) = ([0.0; attend::attend_len(1, 64)], [0.0; 64]);
//! attend::attend(&Plain, &head.view()?, &query, usize::MAX, &mut memory, &mut out)?;
//! assert!((out[0] - 2.0).abs() < 1e-3);
//! # Ok::<(), thinkey_core::Error>(())
//! ```

use crate::{ChannelMask, Error, HeadLayout, HeadMut, HeadRef, Masks, Moments, Rows, Scoring, Span};

#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Aligned<const BYTES: usize>([u8; BYTES]);

/// The cache of one KV head of one sequence in `BYTES` bytes, with room for `PAGES` blocks.
#[derive(Clone, Debug)]
pub struct FixedHead<const BYTES: usize, const PAGES: usize> {
    arena: Aligned<BYTES>,
    layout: HeadLayout,
    pages: heapless::Vec<u32, PAGES>,
    span: Span,
    scored: usize,
    masks: Option<Masks>,
}

#[cfg(feature = "defmt")]
impl<const BYTES: usize, const PAGES: usize> defmt::Format for FixedHead<BYTES, PAGES> {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "FixedHead {{ layout: {}, span: {}, masks: {} }}", self.layout, self.span, self.masks);
    }
}

impl<const BYTES: usize, const PAGES: usize> FixedHead<BYTES, PAGES> {
    /// An empty cache of shape `layout`.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the bytes or pages needed where `layout` takes more than there are.
    pub fn new(layout: HeadLayout) -> Result<Self, Error> {
        layout.check()?;
        let (needed, capacity) = (layout.bytes(), BYTES);
        if needed > capacity {
            return Err(Error::Capacity { what: "arena bytes", needed, capacity });
        }
        if layout.pages as usize > PAGES {
            return Err(Error::Capacity { what: "pages", needed: layout.pages as usize, capacity: PAGES });
        }
        Ok(Self {
            arena: Aligned([0; BYTES]),
            layout,
            pages: heapless::Vec::new(),
            span: Span::default(),
            scored: 0,
            masks: None,
        })
    }

    /// How many tokens are where.
    #[must_use]
    pub const fn span(&self) -> Span {
        self.span
    }

    /// The key channels that the prefix keeps, once tokens have been thinned.
    #[must_use]
    pub fn mask(&self) -> Option<&ChannelMask> {
        self.masks.as_ref().map(|masks| &masks.keys)
    }

    /// Admits `new` tokens. `queries` are the newest queries, `[n][D]` for any n ≥ 1 (the window of a prompt, or the
    /// one of a decode step); they score the channels as long as none have been chosen.
    ///
    /// # Errors
    /// [`Error::Capacity`] with the pages needed, [`Error::Length`] where slices do not fit. The tokens held are
    /// unchanged then.
    pub fn admit(&mut self, queries: &[f32], rows: Rows<'_>, new: usize, prompt: bool) -> Result<(), Error> {
        let head_dim = self.layout.head_dim as usize;
        let admission = self.span.admit(new, self.layout.retention(), prompt);
        let (needed, capacity) = (admission.after.blocks as usize, self.layout.pages as usize);
        if needed > capacity {
            return Err(Error::Capacity { what: "pages", needed, capacity });
        }
        for page in self.pages.len()..needed {
            // Within PAGES, see `new`.
            let _ = self.pages.push(page as u32);
        }
        let mut head = HeadMut::new(self.layout, &mut self.arena.0[..self.layout.bytes()], 0)?;
        if self.masks.is_none() {
            let count = queries.len() / head_dim;
            head.add_query_energy(queries, count, head_dim)?;
            self.scored += count;
            if admission.thinned > 0 {
                let scoring = Scoring { queries: self.scored, ..Scoring::default() };
                let keys = head.choose(&scoring, &admission, rows)?;
                head.correct(&keys, Moments::Tokens { admission: &admission, rows })?;
                self.masks = Some(Masks { keys, values: head.choose_values(&admission, rows)? });
            }
        }
        head.admit(&admission, &self.pages, self.masks.as_ref(), rows)?;
        self.span = admission.after;
        Ok(())
    }

    /// The cache, for attention.
    ///
    /// # Errors
    /// None that [`admit`](Self::admit) would have let through.
    pub fn view(&self) -> Result<HeadRef<'_>, Error> {
        let bytes = &self.arena.0[..self.layout.bytes()];
        HeadRef::new(self.layout, bytes, 0, &self.pages, self.span, self.masks.as_ref())
    }
}
