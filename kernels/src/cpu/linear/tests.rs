use super::*;
use crate::format::WeightFormat;
use bytes::Bytes;
use proptest::prelude::*;

/// A deterministic stream of well-mixed bits (SplitMix64).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// In -1..1.
    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// A matrix of random blocks with scales of about 0.1.
    fn matrix(&mut self, format: WeightFormat, rows: usize, cols: usize) -> Matrix {
        let blocks = rows * cols / format.block_len();
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let at = bytes.len();
            bytes.extend((0..format.block_bytes()).map(|_| self.bits() as u8));
            let halves: &[usize] = match format {
                WeightFormat::F32 => {
                    bytes[at..].copy_from_slice(&self.float().to_le_bytes());
                    &[]
                }
                WeightFormat::Bf16 => {
                    bytes[at..].copy_from_slice(&half::bf16::from_f32(self.float()).to_le_bytes());
                    &[]
                }
                WeightFormat::F16 | WeightFormat::Q8_0 | WeightFormat::Q4_0 | WeightFormat::Q5_0 => &[0],
                WeightFormat::Q6K => &[208],
                _ => &[0, 2],
            };
            for half in halves {
                let scale = half::f16::from_f32(0.1 * self.float()).to_le_bytes();
                bytes[at + half..at + half + 2].copy_from_slice(&scale);
            }
        }
        Matrix::new(format, rows, cols, Bytes::from(bytes)).unwrap()
    }
}

/// Formats and shapes of a layer.
fn parts(layer: &Linear) -> Vec<(&str, usize, usize)> {
    layer.parts.iter().map(|part| (part.format().name(), part.rows(), part.cols())).collect()
}

fn exact(level: Level) -> Arithmetic {
    Arithmetic { level, activations: Activations::Exact }
}

fn int8(level: Level) -> Arithmetic {
    Arithmetic { level, activations: Activations::Int8 }
}

/// What `forward` adds to the output in `f64`, and the sums of absolute products that its rounding is relative to.
fn naive(layer: &Linear, x: &[f32]) -> Vec<(f64, f64)> {
    let mut row = vec![0.0; layer.cols()];
    let mut out = vec![(0.0, 0.0); x.len() / layer.cols() * layer.rows()];
    for r in 0..layer.rows() {
        layer.row(r, &mut row);
        let bias = f64::from(layer.bias.as_ref().map_or(0.0, |bias| bias[r]));
        for (i, x) in x.chunks_exact(layer.cols()).enumerate() {
            let products = || row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let magnitude = products().map(f64::abs).sum::<f64>() + bias.abs();
            out[i * layer.rows() + r] = (products().sum::<f64>() + bias, magnitude);
        }
    }
    out
}

/// What x is read as by matrices that take it in eight bits, and by how much it is off: every `group` of a row in 255
/// steps of their largest magnitude.
fn quantised(x: &[f32], cols: usize, group: usize) -> (Vec<f32>, Vec<f64>) {
    let mut values = Vec::new();
    let mut errors = Vec::new();
    for block in x.chunks_exact(cols).flat_map(|row| row.chunks(group)) {
        let largest = block.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        // The same roundings, or a code at a half goes the other way.
        let (scale, inverse) = (largest * (1.0 / 127.0), if largest > 0.0 { 127.0 / largest } else { 0.0 });
        values.extend(block.iter().map(|x| (x * inverse).round_ties_even() * scale));
        errors.extend(block.iter().map(|_| f64::from(scale) / 2.0));
    }
    (values, errors)
}

/// Runs every level with activations in eight bits, on 1 and 2 threads in both modes, against the product of the
/// quantised activations and, within what quantising changes, of the exact ones.
fn check_int8(layer: &Linear, x: &[f32]) {
    let m = x.len() / layer.cols();
    // Panels give codes an offset of up to 128 and take it away as floats, which costs some of their digits.
    let (group, digits) = if m <= DOT_ROWS { (4, 4e-6) } else { (16, 4e-5) };
    let (values, errors) = quantised(x, layer.cols(), group);
    let (expected, unquantised) = (naive(layer, &values), naive(layer, x));
    let codes: Vec<bool> = layer.parts.iter().flat_map(|part| vec![part.format().has_codes(); part.rows()]).collect();
    // What quantising may change of each output.
    let mut bounds = vec![0.0; expected.len()];
    let mut row = vec![0.0; layer.cols()];
    for r in 0..layer.rows() {
        layer.row(r, &mut row);
        for (i, errors) in errors.chunks_exact(layer.cols()).enumerate() {
            let terms = row.iter().zip(errors).map(|(w, error)| f64::from(w.abs()) * error);
            bounds[i * layer.rows() + r] = terms.sum::<f64>();
        }
    }
    let before = Random(5).floats(m * layer.rows());
    for threads in [1, 2] {
        let pool = Pool::new(threads).unwrap();
        let mut scratch = LinearScratch::default();
        for level in Level::available() {
            for mode in [Mode::Store, Mode::Add] {
                let mut out = if mode == Mode::Add { before.clone() } else { vec![f32::NAN; before.len()] };
                layer.forward(&pool, int8(level), x, &mut out, mode, &mut scratch);
                for (i, actual) in out.iter().enumerate() {
                    let old = if mode == Mode::Add { f64::from(before[i]) } else { 0.0 };
                    let actual = f64::from(*actual) - old;
                    let what = format_args!("{} {:?} {mode:?}, m {m}, output {i}", level.name(), parts(layer));
                    let integer = codes[i % layer.rows()] && (m <= DOT_ROWS || level.has_byte_products());
                    let (value, magnitude) = if integer { expected[i] } else { unquantised[i] };
                    let bound = bounds[i];
                    let rounding = digits * (magnitude + old.abs() + bound);
                    assert!((actual - value).abs() <= rounding, "{what}: {actual} for {value}");
                    let exact = unquantised[i].0;
                    assert!((actual - exact).abs() <= 1.0001 * bound + rounding, "{what}: {actual} for {exact}");
                }
            }
        }
    }
}

/// Runs every level on 1 and 2 threads in both modes against [`naive`].
fn check(layer: &Linear, x: &[f32]) {
    let m = x.len() / layer.cols();
    let expected = naive(layer, x);
    let before = Random(5).floats(m * layer.rows());
    for threads in [1, 2] {
        let pool = Pool::new(threads).unwrap();
        let mut scratch = LinearScratch::default();
        for level in Level::available() {
            for mode in [Mode::Store, Mode::Add] {
                let mut out = if mode == Mode::Add { before.clone() } else { vec![f32::NAN; before.len()] };
                layer.forward(&pool, exact(level), x, &mut out, mode, &mut scratch);
                for (i, (actual, (value, magnitude))) in out.iter().zip(&expected).enumerate() {
                    let old = if mode == Mode::Add { f64::from(before[i]) } else { 0.0 };
                    let error = (f64::from(*actual) - old - value).abs();
                    assert!(
                        error <= 2e-6 * (magnitude + old.abs()),
                        "{} {:?} {mode:?} {threads} threads, m {m}, output {i}: {actual} for {value} + {old}",
                        level.name(),
                        parts(layer),
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases.min(96)))]

    #[test]
    fn any_layer_equals_the_naive_product(
        seed: u64, format in prop::sample::select(&WeightFormat::ALL[..]), second in prop::sample::select(&WeightFormat::ALL[..]),
        m in 0usize..40, rows in prop::array::uniform2(1usize..70), width in 1usize..4, cut in 0usize..300, bias: bool,
    ) {
        let mut random = Random(seed);
        let longest = format.block_len().max(second.block_len());
        // Float formats take any number of columns.
        let cols = if longest == 1 { 1 + cut } else { width * longest };
        let parts = vec![random.matrix(format, rows[0], cols), random.matrix(second, rows[1], cols)];
        let bias = bias.then(|| random.floats(rows[0] + rows[1]));
        let layer = Linear::new(parts, bias).unwrap();
        let x = random.floats(m * cols);
        check(&layer, &x);
        check_int8(&layer, &x);
    }
}

#[test]
fn every_format_at_every_small_batch() {
    for format in WeightFormat::ALL {
        let mut random = Random(7);
        let layer = Linear::new(vec![random.matrix(format, 37, 512)], None).unwrap();
        for m in 1..=DOT_ROWS + 2 {
            let x = random.floats(m * 512);
            check(&layer, &x);
            check_int8(&layer, &x);
        }
    }
}

/// Rows that end in every part of a segment of 256, blocks of zeros, huge and tiny activations, the largest codes.
#[test]
fn int8_at_the_edges() {
    for format in [WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4_1] {
        for blocks in 1..=17 {
            let mut random = Random(blocks as u64);
            let cols = 32 * blocks;
            let layer = Linear::new(vec![random.matrix(format, 5, cols)], None).unwrap();
            let mut x = random.floats(3 * cols);
            x[..32].fill(0.0);
            x[32 * (blocks - 1)..cols].iter_mut().for_each(|x| *x *= 1e20);
            x[cols..2 * cols].iter_mut().for_each(|x| *x *= 1e-20);
            check_int8(&layer, &x);
            check_int8(&layer, &x.repeat(4));
        }
    }
    // Every weight the least there is, -128 or -32 or -8 or 0; every activation of the same magnitude.
    for format in WeightFormat::ALL.into_iter().filter(|format| format.has_codes()) {
        let cols = 2 * format.block_len().max(32);
        for byte in [0x80, 0x00, 0xFF, 0x7F] {
            let mut bytes = vec![byte; 3 * format.row_bytes(cols).unwrap()];
            for block in bytes.chunks_exact_mut(format.block_bytes()) {
                let half = if format == WeightFormat::Q6K { 208 } else { 0 };
                block[half..half + 2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
                if matches!(format, WeightFormat::Q4_1 | WeightFormat::Q4K | WeightFormat::Q5K) {
                    block[2..4].copy_from_slice(&half::f16::from_f32(0.02).to_le_bytes());
                }
            }
            let matrix = Matrix::new(format, 3, cols, Bytes::from(bytes)).unwrap();
            let layer = Linear::new(vec![matrix], None).unwrap();
            check_int8(&layer, &vec![1.0; cols]);
            check_int8(&layer, &vec![-1.0; cols]);
            check_int8(&layer, &vec![1.0; 9 * cols]);
        }
    }
}

#[test]
fn what_is_not_a_number_goes_through() {
    let pool = Pool::new(1).unwrap();
    for format in WeightFormat::ALL {
        let cols = 2 * format.block_len().max(32);
        let layer = Linear::new(vec![Random(9).matrix(format, 3, cols)], None).unwrap();
        for (bad, m) in [(f32::NAN, 1), (f32::INFINITY, 2), (f32::NEG_INFINITY, 11)] {
            for arithmetic in Level::available().flat_map(|level| [exact(level), int8(level)]) {
                let mut x = Random(4).floats(m * cols);
                x[cols - 1] = bad;
                let mut out = vec![0.0; 3 * m];
                layer.forward(&pool, arithmetic, &x, &mut out, Mode::Store, &mut LinearScratch::default());
                let (spoilt, sound) = out.split_at(3);
                assert!(spoilt.iter().all(|out| !out.is_finite()), "{} {arithmetic:?}: {out:?}", format.name());
                assert!(sound.iter().all(|out| out.is_finite()), "{} {arithmetic:?}: {out:?}", format.name());
            }
        }
    }
}

#[test]
fn long_rows_are_split_and_summed() {
    let mut random = Random(11);
    for (format, cols) in [(WeightFormat::Q6K, 4352), (WeightFormat::F32, 4099), (WeightFormat::Q4_1, 2080)] {
        let bias = random.floats(35);
        let layer = Linear::new(vec![random.matrix(format, 35, cols)], Some(bias)).unwrap();
        check(&layer, &random.floats(9 * cols));
        check_int8(&layer, &random.floats(3 * cols));
        check_int8(&layer, &random.floats(13 * cols));
    }
}

#[test]
fn a_row_of_x_gives_the_same_alone_and_in_a_batch() {
    let mut random = Random(3);
    let pool = Pool::new(2).unwrap();
    let mut scratch = LinearScratch::default();
    for format in WeightFormat::ALL {
        let (rows, cols, m) = (100, 768, 50);
        let layer = Linear::new(vec![random.matrix(format, rows, cols)], None).unwrap();
        let x = random.floats(m * cols);
        let magnitudes = naive(&layer, &x);
        for arithmetic in Level::available().map(exact) {
            let mut batch = vec![0.0; m * rows];
            layer.forward(&pool, arithmetic, &x, &mut batch, Mode::Store, &mut scratch);
            for (i, x) in x.chunks_exact(cols).enumerate() {
                let mut alone = vec![0.0; rows];
                layer.forward(&pool, arithmetic, x, &mut alone, Mode::Store, &mut scratch);
                for (r, (a, b)) in alone.iter().zip(&batch[i * rows..]).enumerate() {
                    assert!(f64::from((a - b).abs()) <= 1e-6 * magnitudes[i * rows + r].1, "{} {a} {b}", format.name());
                }
            }
        }
    }
}

#[test]
fn rows_are_those_of_the_stacked_matrices() {
    let mut random = Random(1);
    let parts = vec![random.matrix(WeightFormat::Q8_0, 3, 64), random.matrix(WeightFormat::F16, 2, 64)];
    let layer = Linear::new(parts.clone(), None).unwrap();
    assert_eq!((layer.rows(), layer.cols(), layer.bytes()), (5, 64, 3 * 68 + 2 * 128));
    for (index, (part, row)) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)].into_iter().enumerate() {
        let (mut actual, mut expected) = ([0.0; 64], [1.0; 64]);
        layer.row(index, &mut actual);
        parts[part].format().dequantise_row(parts[part].row(row), &mut expected);
        assert_eq!(actual, expected);
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let mut random = Random(1);
    let [a, b] = [64, 32].map(|cols| random.matrix(WeightFormat::Q8_0, 3, cols));
    assert_eq!(Linear::new(vec![], None).unwrap_err(), LinearError::Empty);
    let error = Linear::new(vec![a.clone(), b], None).unwrap_err();
    assert_eq!(error, LinearError::Columns { expected: 64, actual: 32 });
    let error = Linear::new(vec![a], Some(vec![0.0; 4])).unwrap_err();
    assert_eq!(error.to_string(), "a bias of 4 values does not fit 3 rows");
}

#[test]
#[should_panic(expected = "the output of 2 rows of x is not [2, 3]")]
fn an_output_of_another_size_is_refused() {
    let layer = Linear::new(vec![Random(1).matrix(WeightFormat::Q8_0, 3, 32)], None).unwrap();
    let pool = Pool::new(1).unwrap();
    layer.forward(&pool, exact(Level::best()), &[0.0; 64], &mut [0.0; 5], Mode::Store, &mut LinearScratch::default());
}
