//! Linear layers at the shapes of SmolLM2-135M: `elements` a second are weights for decoding, multiplications for
//! prefill. `cargo bench --bench linear -- decode/int8/Q4_1` picks some.

#![allow(missing_docs, reason = "criterion_group! writes a public function without any")]

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use thinkey_kernels::cpu::aligned::AlignedVec;
use thinkey_kernels::cpu::gemm::{PANEL, Shape, Strided, StridedMut, gemm_panel};
use thinkey_kernels::cpu::linear::{Activations, Arithmetic, Linear, LinearScratch, Mode};
use thinkey_kernels::cpu::pool::Pool;
use thinkey_kernels::cpu::simd::Level;
use thinkey_kernels::format::{Matrix, WeightFormat};

/// Rows and columns: fused QKV, gate and up, down, output head.
const SHAPES: [(usize, usize); 4] = [(960, 576), (3072, 576), (576, 1536), (49152, 576)];

/// A layer whose bytes are all alike: every scale is about 0.0078, none is infinite or subnormal.
fn layer(format: WeightFormat, rows: usize, cols: usize) -> Linear {
    // The last columns are dropped where they make no whole block.
    let cols = cols / format.block_len() * format.block_len();
    let bytes = vec![0x20; rows * format.row_bytes(cols).expect("whole blocks")];
    let matrix = Matrix::new(format, rows, cols, Bytes::from(bytes)).expect("bytes of the shape");
    Linear::new(vec![matrix], None).expect("one matrix")
}

fn forward(c: &mut Criterion, name: &str, formats: &[WeightFormat], activations: Activations, m: usize) {
    let arithmetic = Arithmetic { level: Level::best(), activations };
    for format in formats {
        let mut group = c.benchmark_group(format!("{name}/{}/{}", activations.name(), format.name()));
        for (rows, cols) in SHAPES {
            let layer = layer(*format, rows, cols);
            // The output head sees only the last token of a prompt.
            if m > 1 && rows == 49152 {
                continue;
            }
            group.throughput(Throughput::Elements((m * rows * layer.cols()) as u64));
            let x = AlignedVec::zeros(m * layer.cols());
            let mut out = AlignedVec::zeros(m * rows);
            for threads in [1, 2] {
                let pool = Pool::new(threads).expect("threads");
                let mut scratch = LinearScratch::default();
                group.bench_function(BenchmarkId::new(format!("{rows}x{cols}"), threads), |b| {
                    let (x, out) = (&x[..m * layer.cols()], &mut out[..m * rows]);
                    b.iter(|| layer.forward(&pool, arithmetic, black_box(x), out, Mode::Store, &mut scratch));
                });
            }
        }
    }
}

fn decode(c: &mut Criterion) {
    forward(c, "decode", &WeightFormat::ALL, Activations::Exact, 1);
    let integer: Vec<_> = WeightFormat::ALL.into_iter().filter(|format| format.has_codes()).collect();
    forward(c, "decode", &integer, Activations::Int8, 1);
}

/// Every level, one thread: `cargo bench --bench linear -- levels/Q6_K`.
fn levels(c: &mut Criterion) {
    let (rows, cols) = (3072, 768);
    let pool = Pool::new(1).expect("threads");
    for format in WeightFormat::ALL {
        let mut group = c.benchmark_group(format!("levels/{}", format.name()));
        let layer = layer(format, rows, cols);
        group.throughput(Throughput::Elements((rows * cols) as u64));
        let (x, mut out, mut scratch) = (AlignedVec::zeros(cols), AlignedVec::zeros(rows), LinearScratch::default());
        for level in Level::available() {
            for activations in [Activations::Exact, Activations::Int8] {
                let arithmetic = Arithmetic { level, activations };
                group.bench_function(BenchmarkId::new(level.name(), activations.name()), |b| {
                    b.iter(|| layer.forward(&pool, arithmetic, black_box(&x), &mut out, Mode::Store, &mut scratch));
                });
            }
        }
    }
}

fn prefill(c: &mut Criterion) {
    forward(c, "prefill", &[WeightFormat::F32, WeightFormat::Q4_1, WeightFormat::Q6K], Activations::Exact, 512);
    forward(c, "prefill", &[WeightFormat::Q4_1, WeightFormat::Q6K], Activations::Int8, 512);
}

fn micro_kernel(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemm_panel");
    for (m, k) in [(512, 576), (512, 1536), (128, 64)] {
        let (a, b, mut out) = (AlignedVec::zeros(m * k), AlignedVec::zeros(k * PANEL), AlignedVec::zeros(m * PANEL));
        group.throughput(Throughput::Elements((m * k * PANEL) as u64));
        for level in Level::available() {
            group.bench_function(BenchmarkId::new(level.name(), format!("{m}x{k}")), |bencher| {
                bencher.iter(|| {
                    let c = StridedMut { data: &mut out, stride: PANEL };
                    let (a, b) = (Strided { data: &a, stride: k }, Strided { data: &b, stride: PANEL });
                    gemm_panel(level, Shape { m, k, n: PANEL }, black_box(a), b, c, false);
                });
            });
        }
    }
}

fn fork_join(c: &mut Criterion) {
    let mut group = c.benchmark_group("fork_join");
    for threads in [1, 2] {
        let pool = Pool::new(threads).expect("threads");
        group.bench_function(BenchmarkId::from_parameter(threads), |b| {
            b.iter(|| pool.run(8, &|task| _ = black_box(task)))
        });
    }
}

criterion_group!(benches, decode, levels, prefill, micro_kernel, fork_join);
criterion_main!(benches);
