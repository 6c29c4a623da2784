//! Linear layers on the device: weights in the format of their file, multiplied as they are for a few rows, and for more
//! in parts that are dequantised one after the other.

use super::{
    gemv::{self, Outcome, Product},
    launch::{Numbers, allocate_exactly, cubes, launch, plane},
    weights::{self, Packed},
};
use crate::{
    cpu::linear::{Linear, LinearError},
    format::{Matrix, PART, WeightFormat},
};
use cubecl::prelude::*;

/// Most rows that are multiplied with weights as they are stored. Each eight read the weights once; dequantised they are
/// eight and more bytes to write and read, where those of four bits have half a byte.
pub(super) const FEW: usize = 32;

/// Matrices of one format, stacked.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    format: WeightFormat,
    rows: usize,
    words: Numbers,
}

/// A linear layer on the device.
#[derive(Clone, Debug)]
pub struct DeviceLinear {
    segments: Vec<Segment>,
    rows: usize,
    cols: usize,
    bias: Option<Numbers>,
}

/// Rows of a buffer: the first, how many, and how many numbers one has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span<'a> {
    pub(super) numbers: &'a Numbers,
    pub(super) first: usize,
    pub(super) width: usize,
}

/// The factors of a normalisation, and what is added to the mean square.
pub(super) type NormOf<'a> = Option<(&'a Numbers, f32)>;

impl DeviceLinear {
    /// A layer of `parts` stacked in their order.
    ///
    /// # Errors
    /// As [`Linear::new`].
    pub(super) fn new<R: Runtime>(
        client: &ComputeClient<R>,
        parts: Vec<Matrix>,
        bias: Option<Vec<f32>>,
    ) -> Result<Self, LinearError> {
        let layer = Linear::new(parts, bias)?;
        allocate_exactly(client);
        Ok(Self::upload(client, &layer))
    }

    fn upload<R: Runtime>(client: &ComputeClient<R>, layer: &Linear) -> Self {
        let mut segments = Vec::new();
        for parts in layer.parts().chunk_by(|a, b| a.format() == b.format()) {
            let bytes: usize = parts.iter().map(|part| part.bytes().len()).sum();
            // Kernels look at the word behind the one that they want.
            let mut words = vec![0u32; bytes.div_ceil(4) + 1];
            let mut rest: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
            for part in parts {
                let (own, tail) = rest.split_at_mut(part.bytes().len());
                own.copy_from_slice(part.bytes());
                rest = tail;
            }
            segments.push(Segment {
                format: parts[0].format(),
                rows: parts.iter().map(Matrix::rows).sum(),
                words: Numbers::of(client, &words),
            });
        }
        let bias = layer.bias().map(|bias| Numbers::of(client, bytemuck::cast_slice(bias)));
        Self { segments, rows: layer.rows(), cols: layer.cols(), bias }
    }

    /// Output features.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// The bias, one value a row.
    pub(super) const fn bias(&self) -> Option<&Numbers> {
        self.bias.as_ref()
    }

    fn packed(&self, segment: &Segment) -> Packed {
        Packed { format: segment.format, cols: self.cols }
    }

    /// Whether gate and up can be multiplied with each other at once: they are stored alike.
    pub(super) fn gates(&self) -> bool {
        self.segments.len() == 1 && self.bias.is_none() && self.rows.is_multiple_of(2)
    }

    /// norm(x)·Wᵀ + bias of `count` rows of `x` into or onto those of `out`. One launch a format.
    ///
    /// # Panics
    /// Where it is to be gated and [cannot](Self::gates).
    pub(super) fn multiply<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        (x, out, count): (Span<'_>, Span<'_>, usize),
        norm: NormOf<'_>,
        outcome: Outcome,
    ) {
        assert!(outcome != Outcome::Gated || self.gates(), "gate and up are stored alike");
        let mut at = 0;
        for segment in &self.segments {
            let packed = self.packed(segment);
            let (biased, normed) = (self.bias.is_some(), norm.is_some());
            let product =
                Product { packed, rows: count.min(gemv::ROWS), normed, biased, outcome, plane: plane(client) };
            let outputs = if outcome == Outcome::Gated { segment.rows / 2 } else { segment.rows };
            let (factors, eps) = norm.unwrap_or((&segment.words, 0.0));
            let cubes = cubes(outputs.div_ceil(product.outputs()), count.div_ceil(gemv::ROWS), 1);
            let bias = self.bias.as_ref().unwrap_or(&segment.words);
            // SAFETY: rows are clamped to those of `x` and of the matrix, whose words have one more behind them; every cube
            // writes to numbers of its own, below `count` rows and the segment's columns. What is not there is not read.
            unsafe {
                launch!(
                    client,
                    gemv::gemv,
                    weights::UNITS,
                    cubes,
                    [segment.words, x.numbers, factors, bias, out.numbers],
                    x.first as u32,
                    count as u32,
                    segment.rows as u32,
                    out.first as u32,
                    out.width as u32,
                    at as u32,
                    eps,
                    product,
                );
            }
            at += segment.rows;
        }
    }

    /// Parts of the weights, dequantised, `[rows][cols]` each, of at most [`PART`] bytes, in their order; and their rows.
    pub(super) fn parts<R: Runtime>(&self, client: &ComputeClient<R>) -> impl Iterator<Item = (Numbers, usize)> {
        let most = (PART / 4 / self.cols).max(1);
        self.segments.iter().flat_map(move |segment| {
            (0..segment.rows).step_by(most).map(move |first| {
                let count = most.min(segment.rows - first);
                (self.dequantise(client, segment, first, count, None), count)
            })
        })
    }

    /// The rows that `list` names, dequantised.
    ///
    /// # Panics
    /// Where the layer has parts in several formats: embeddings are one matrix.
    pub(super) fn listed<R: Runtime>(&self, client: &ComputeClient<R>, list: &[u32]) -> Numbers {
        let [segment] = &self.segments[..] else { panic!("a table of embeddings is one matrix") };
        let most = segment.rows as u32 - 1;
        assert!(list.iter().all(|&row| row <= most), "rows of a table of {} rows", segment.rows);
        self.dequantise(client, segment, 0, list.len(), Some(&Numbers::of(client, list)))
    }

    fn dequantise<R: Runtime>(
        &self,
        client: &ComputeClient<R>,
        segment: &Segment,
        first: usize,
        count: usize,
        list: Option<&Numbers>,
    ) -> Numbers {
        let packed = self.packed(segment);
        let out = Numbers::empty(client, count * self.cols);
        let cubes = cubes((count * packed.pieces()).div_ceil(weights::UNITS).min(weights::CUBES), 1, 1);
        let rows = list.unwrap_or(&segment.words);
        // SAFETY: rows are those of the matrix, whose words have one more behind them; units write to numbers of their own.
        unsafe {
            launch!(
                client,
                weights::dequantise,
                weights::UNITS,
                cubes,
                [segment.words, rows, out],
                first as u32,
                count as u32,
                packed,
                list.is_some(),
            );
        }
        out
    }
}
