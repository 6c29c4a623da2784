//! Linear layers on a software Vulkan against weights that the processor unpacks and products in f64.

use super::Device;
use crate::{
    format::{Matrix, WeightFormat},
    ops::{Norm, Rows, ThinOps},
};
use burn::tensor::{Tensor, TensorData};
use burn_wgpu::{Wgpu, WgpuRuntime};
use bytes::Bytes;
use half::{bf16, f16};

type Vulkan = Device<Wgpu, WgpuRuntime>;

const EPS: f32 = 1e-5;

struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Between -1 and 1.
    fn next(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    /// A matrix whose codes are random bits, with scales of which some are subnormal.
    fn matrix(&mut self, format: WeightFormat, rows: usize, cols: usize) -> Matrix {
        use WeightFormat::{Bf16, F16, F32, Q4_1, Q4K, Q5_1, Q5K, Q6K};
        let mut bytes = Vec::new();
        for block in 0..rows * cols / format.block_len() {
            let start = bytes.len();
            match format {
                F32 => bytes.extend(self.next().to_le_bytes()),
                F16 => bytes.extend(f16::from_f32(self.next()).to_le_bytes()),
                Bf16 => bytes.extend(bf16::from_f32(self.next()).to_le_bytes()),
                _ => bytes.extend((0..format.block_bytes()).map(|_| self.bits() as u8)),
            }
            let size = if block % 5 == 3 { 1e-6 } else { 0.02 };
            let halves: &[usize] = match format {
                F32 | F16 | Bf16 => &[],
                Q4_1 | Q5_1 | Q4K | Q5K => &[0, 2],
                Q6K => &[208],
                _ => &[0],
            };
            for at in halves {
                let half = f16::from_f32(self.next() * size).to_le_bytes();
                bytes[start + at..start + at + 2].copy_from_slice(&half);
            }
        }
        Matrix::new(format, rows, cols, Bytes::from(bytes)).unwrap()
    }
}

/// The weights of `parts`, row after row.
fn dense(parts: &[Matrix]) -> Vec<Vec<f32>> {
    let row = |part: &Matrix, row: usize| {
        let mut out = vec![0.0; part.cols()];
        part.format().dequantise_row(part.row(row), &mut out);
        out
    };
    parts.iter().flat_map(|part| (0..part.rows()).map(move |at| row(part, at))).collect()
}

/// x·Wᵀ, and for each number how large its terms are together.
fn product(x: &[Vec<f32>], weights: &[Vec<f32>]) -> Vec<Vec<(f32, f32)>> {
    let dot = |x: &[f32], w: &[f32]| {
        let terms = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
        (terms.clone().sum::<f64>() as f32, terms.map(f64::abs).sum::<f64>() as f32)
    };
    x.iter().map(|x| weights.iter().map(|w| dot(x, w)).collect()).collect()
}

fn normed(x: &[Vec<f32>], weight: &[f32]) -> Vec<Vec<f32>> {
    let row = |x: &Vec<f32>| {
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
        x.iter().zip(weight).map(|(&x, &w)| (f64::from(x) * factor * f64::from(w)) as f32).collect()
    };
    x.iter().map(row).collect()
}

fn upload(ops: &Vulkan, rows: &[Vec<f32>]) -> Rows<Vulkan> {
    let _ = ops;
    Tensor::from_data(TensorData::new(rows.concat(), [rows.len(), rows[0].len()]), &Default::default())
}

fn check(ops: &Vulkan, what: &str, actual: &Rows<Vulkan>, expected: &[Vec<(f32, f32)>]) {
    let mut numbers = Vec::new();
    ops.read(actual, &mut numbers);
    assert_eq!(numbers.len(), expected.iter().map(Vec::len).sum::<usize>(), "{what}");
    for (at, (x, (y, size))) in numbers.iter().zip(expected.iter().flatten()).enumerate() {
        assert!((x - y).abs() <= 2e-6 * size + 1e-6, "{what}: place {at}: {x}, not {y}");
    }
}

/// Every format, columns that are no whole number of pieces, odd rows, and batches up to more than one launch takes at once.
/// Each batch up to eight is a kernel of its own; how many rows there are and how weights are unpacked are apart, so that
/// one format goes through all.
#[test]
fn products_are_those_of_unpacked_weights() {
    let mut ops = Vulkan::new(Default::default());
    let mut random = Random(1);
    for format in WeightFormat::ALL {
        let all: &[usize] = if format == WeightFormat::Q4_0 { &[1, 2, 3, 4, 5, 6, 7, 8, 9] } else { &[2, 40] };
        let shapes = match format.block_len() {
            1 => [(7, 37, all), (34, 100, &[1, 9])],
            32 => [(1, 32, all), (35, 288, &[1, 9])],
            _ => [(3, 256, all), (34, 512, &[1, 9])],
        };
        for (rows, cols, batches) in shapes {
            let parts = vec![random.matrix(format, rows, cols), random.matrix(format, 3, cols)];
            let (weights, rows) = (dense(&parts), rows + 3);
            let bias = random.numbers(rows);
            let biased = ops.linear(parts.clone(), Some(bias.clone())).unwrap();
            let plain = ops.linear(parts, None).unwrap();
            let factors = random.numbers(cols);
            let norm = Norm { weight: ops.vector(factors.clone()), eps: EPS };
            for &batch in batches {
                let what = format!("{} {rows}×{cols}, {batch} rows", format.name());
                let x: Vec<_> = (0..batch + 2).map(|_| random.numbers(cols)).collect();
                let tensor = upload(&ops, &x);
                let out = ops.rows(batch, rows);
                let out = ops.norm_linear(&tensor, 1..batch + 1, &norm, &biased, out);
                let mut expected = product(&normed(&x[1..batch + 1], &factors), &weights);
                expected.iter_mut().for_each(|row| row.iter_mut().zip(&bias).for_each(|(x, b)| x.0 += b));
                check(&ops, &what, &out, &expected);

                // Onto the rows of something else.
                let before: Vec<_> = (0..batch + 3).map(|_| random.numbers(rows)).collect();
                let sum = upload(&ops, &before);
                let shared = sum.clone();
                let out = ops.add_linear(&upload(&ops, &x[..batch]), &plain, sum, 2..batch + 2);
                let products = product(&x[..batch], &weights);
                let mut expected: Vec<Vec<_>> =
                    before.iter().map(|row| row.iter().map(|&x| (x, 1.0)).collect()).collect();
                for (row, products) in expected[2..].iter_mut().zip(products) {
                    row.iter_mut().zip(products).for_each(|(x, (y, size))| *x = (x.0 + y, 1.0 + size));
                }
                check(&ops, &what, &out, &expected);
                let unchanged: Vec<Vec<_>> = before.iter().map(|row| row.iter().map(|&x| (x, 1.0)).collect()).collect();
                check(&ops, "what others hold too", &shared, &unchanged);
            }
        }
    }
}

/// Gate and up stored alike, and not, of a few rows and of many.
#[test]
fn feed_forward_parts_are_gated() {
    let mut ops = Vulkan::new(Default::default());
    let mut random = Random(2);
    let (width, inner) = (256, 96);
    for (gate, up) in [(WeightFormat::Q4_1, WeightFormat::Q4_1), (WeightFormat::Q4K, WeightFormat::Q6K)] {
        let parts = vec![random.matrix(gate, inner, width), random.matrix(up, inner, width)];
        let down = vec![random.matrix(WeightFormat::Q8_0, width, inner)];
        let (weights, down_weights) = (dense(&parts), dense(&down));
        let (gate_up, down) = (ops.linear(parts, None).unwrap(), ops.linear(down, None).unwrap());
        let factors = random.numbers(width);
        let norm = Norm { weight: ops.vector(factors.clone()), eps: EPS };
        for batch in [1, 3, 8, 20, 50] {
            let x: Vec<_> = (0..batch).map(|_| random.numbers(width)).collect();
            let wide = product(&normed(&x, &factors), &weights);
            let gated = |row: &Vec<(f32, f32)>| {
                let of = |at: usize| row[at].0 / (1.0 + (-row[at].0).exp()) * row[inner + at].0;
                (0..inner).map(of).collect::<Vec<f32>>()
            };
            let mut expected = product(&wide.iter().map(gated).collect::<Vec<_>>(), &down_weights);
            for (row, x) in expected.iter_mut().zip(&x) {
                // What is rounded in the middle counts too.
                row.iter_mut().zip(x).for_each(|(y, x)| *y = (y.0 + x, 20.0 + 4.0 * y.1));
            }
            let out = ops.feed_forward(upload(&ops, &x), 0..batch, &norm, &gate_up, &down);
            check(&ops, &format!("{}, {batch} rows", gate.name()), &out, &expected);
        }
    }
}

#[test]
fn embeddings_are_rows_of_their_table() {
    let mut ops = Vulkan::new(Default::default());
    let mut random = Random(3);
    for format in WeightFormat::ALL {
        let cols = if format.block_len() == 1 { 75 } else { 256 };
        let table = random.matrix(format, 50, cols);
        let rows = dense(std::slice::from_ref(&table));
        let tokens = [49, 0, 7, 7, 13];
        let layer = ops.linear(vec![table], None).unwrap();
        let out = ops.rows(tokens.len(), cols);
        let out = ops.embed(&layer, &tokens, out);
        let expected: Vec<Vec<_>> =
            tokens.iter().map(|&token| rows[token as usize].iter().map(|&x| (x, x.abs())).collect()).collect();
        check(&ops, format.name(), &out, &expected);
    }
}
