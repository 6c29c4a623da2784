//! Every kernel as CUDA C++, compiled by NVRTC: nothing reaches a GPU uncompiled. No GPU takes part.

use super::{
    append, attention, best,
    cache::DeviceCache,
    copy, extend, flush,
    gemv::{self, Outcome, Product},
    hold,
    layout::Shape,
    learn, merge,
    prefill::{self, PromptShape},
    residual::{self, Told},
    rotate::{self, Turn},
    score, select, solve,
    tests::client,
    tile,
    weights::{self, Packed},
};
use crate::format::WeightFormat;
use burn_wgpu::WgpuRuntime;
use cubecl::{
    Compiler, Runtime,
    cuda::CudaRuntime,
    prelude::{ArrayCompilationArg, CubeDim, CubeKernel, ExecutionMode, KernelSettings},
};
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString};
use thinkey_core::StorageKind;

/// Architectures: Jetson Orin, and H100.
const ARCHITECTURES: [&str; 2] = ["sm_87", "sm_90"];

fn source<K: CubeKernel>(kernel: &K) -> String {
    let mut compiler = <CudaRuntime as Runtime>::Compiler::default();
    let kernel =
        compiler.compile(kernel.define(), &Default::default(), ExecutionMode::Unchecked, kernel.address_type());
    kernel.unwrap().to_string()
}

/// Compiles `source`; what NVRTC says where it does not.
fn compile(source: &str, architecture: &str, include: &str) -> Result<(), String> {
    let source = CString::new(source).unwrap();
    let (architecture, include) = (format!("--gpu-architecture={architecture}"), format!("--include-path={include}"));
    // SAFETY: the source ends in a zero and outlives the program, which is destroyed once.
    unsafe {
        let program = result::create_program(source.as_c_str(), None).unwrap();
        let compiled = result::compile_program(program, &[architecture.as_str(), include.as_str()]);
        let log = result::get_program_log(program).unwrap();
        let log = CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned();
        result::destroy_program(program).unwrap();
        compiled.map_err(|_| log)
    }
}

#[test]
fn kernels_compile_for_cuda() {
    let Ok(toolkit) = std::env::var("CUDA_PATH") else {
        return eprintln!("######## SKIPPED: CUDA_PATH names no headers, kernels are not compiled");
    };
    // SAFETY: opens the library and closes it again; nothing of it is called.
    assert!(unsafe { sys::is_culib_present() }, "CUDA_PATH is set, but libnvrtc is not on LD_LIBRARY_PATH");
    let include = format!("{toolkit}/include");
    // The name is for readers alone.
    let array = |_: &str| ArrayCompilationArg { inplace: None };
    let mut sources = Vec::new();
    // What it is called, the kernel, units of a cube, arrays, and what else it is made with.
    macro_rules! check {
        ($what:expr, $file:ident::$kernel:ident::$made:ident, $units:expr, [$($array:ident),*] $(, $other:expr)*) => {{
            let settings = KernelSettings::default().cube_dim(CubeDim::new_1d($units as u32));
            let kernel = $file::$kernel::$made::<WgpuRuntime>::new(
                settings,
                client(),
                $(array(stringify!($array)),)*
                $($other),*
            );
            sources.push(($what, source(&kernel)));
        }};
    }
    for (dim, group) in [(64, 3), (128, 4)] {
        for kind in StorageKind::ALL.into_iter().filter(|&kind| DeviceCache::<WgpuRuntime>::stores(kind)) {
            let shape = Shape {
                dim,
                group,
                keys: if kind.turns() { StorageKind::Int4 } else { kind },
                values: kind,
                sinks: 4,
                stride: 64,
                corrected: true,
                copies: 1,
                queries_width: (group + 2) * dim,
                width: (group + 2) * dim,
                keys_at: group * dim,
                values_at: (group + 1) * dim,
            };
            let name = |kernel| format!("{kernel} of {dim} channels in {}", kind.name());
            check!(
                name("attend"),
                attention::attend::Attend,
                attention::UNITS,
                [arena, heads, rows, pages, queries, partials],
                shape,
                32
            );
            check!(
                name("extend"),
                extend::extend::Extend,
                tile::UNITS,
                [arena, heads, rows, pages, queries, partials],
                (),
                shape
            );
            check!(
                name("flush"),
                flush::flush::Flush,
                flush::UNITS,
                [arena, heads, steps, pages, channels, fused],
                shape
            );
            // These know the numbers of the ring alone.
            if StorageKind::from(kind.ring()) == kind {
                check!(
                    name("thin_queries"),
                    attention::thin_queries::ThinQueries,
                    attention::UNITS,
                    [arena, heads, rows, channels, fused, queries],
                    (),
                    shape
                );
                check!(
                    name("energies"),
                    score::energies::Energies,
                    score::UNITS,
                    [arena, heads, steps, queries, fused, sums],
                    shape,
                    false
                );
                check!(name("append"), append::append::Append, append::UNITS, [arena, heads, steps, fused], shape);
                let told = Told { dim, rows: 32 * group };
                check!(
                    name("solve"),
                    solve::solve::Solve,
                    solve::UNITS,
                    [numbers, heads, channels, scratch, arena],
                    (),
                    (),
                    told,
                    shape.correction()
                );
                check!(name("means"), learn::means::Means, score::UNITS, [arena, heads, steps, channels, fused], shape);
                check!(
                    name("whole_keys"),
                    learn::whole_keys::WholeKeys,
                    score::UNITS,
                    [arena, heads, out],
                    (),
                    (),
                    (),
                    shape
                );
            }
            // And these only how many numbers there are.
            if kind == StorageKind::F32 {
                check!(
                    name("hold"),
                    hold::hold::Hold,
                    hold::UNITS,
                    [fused, held, queries],
                    (),
                    (),
                    group * dim,
                    shape.width
                );
                check!(
                    name("prefill"),
                    prefill::prefill::Prefill,
                    tile::UNITS,
                    [fused, held, ends, out],
                    (),
                    (),
                    (),
                    (),
                    (),
                    PromptShape { dim, heads: 2, group, continued: true }
                );
                check!(
                    name("select_channels"),
                    select::select_channels::SelectChannels,
                    score::UNITS,
                    [arena, heads, steps, sums, channels],
                    (),
                    shape,
                    true
                );
                check!(
                    name("merge"),
                    merge::merge::Merge,
                    attention::UNITS,
                    [partials, out, ends],
                    (),
                    dim,
                    group,
                    true
                );
                check!(
                    name("sketch_energies"),
                    score::sketch_energies::SketchEnergies,
                    score::UNITS,
                    [arena, heads, steps, fused, signs, sums],
                    (),
                    shape
                );
                let told = Told { dim, rows: 32 * group };
                check!(
                    name("choose"),
                    residual::choose::Choose,
                    residual::UNITS,
                    [numbers, heads, scratch, channels],
                    (),
                    told
                );
                let turn = Turn { heads: group, dim, width: (group + 2) * dim, adjacent: group == 3, normed: true };
                check!(
                    name("rotate"),
                    rotate::rotate::Rotate,
                    rotate::UNITS,
                    [fused, positions, frequencies, queries, keys],
                    (),
                    turn
                );
            }
        }
    }
    check!("copy".to_owned(), copy::copy::Copy, copy::UNITS, [from, to, runs], ());
    check!("clear".to_owned(), copy::clear::Clear, copy::UNITS, [to], ());
    for first in [true, false] {
        check!(format!("best, first: {first}"), best::best::Best, best::UNITS, [from, out], (), (), first);
    }
    for format in WeightFormat::ALL {
        let packed = Packed { format, cols: 1536 };
        for (rows, normed, biased, outcome) in [(1, true, false, Outcome::Gated), (8, true, true, Outcome::Stored)] {
            let product = Product { packed, rows, normed, biased, outcome, plane: 32 };
            check!(
                format!("gemv of {rows} rows in {}", format.name()),
                gemv::gemv::Gemv,
                weights::UNITS,
                [words, x, norm, bias, out],
                (),
                (),
                (),
                (),
                (),
                (),
                (),
                product
            );
        }
        check!(
            format!("dequantise of {}", format.name()),
            weights::dequantise::Dequantise,
            weights::UNITS,
            [words, list, out],
            (),
            (),
            packed,
            false
        );
    }
    std::thread::scope(|scope| {
        for architecture in ARCHITECTURES {
            let (sources, include) = (&sources, &include);
            scope.spawn(move || {
                for (what, source) in sources {
                    if let Err(log) = compile(source, architecture, include) {
                        panic!("{what} for {architecture}: {log}\n{source}");
                    }
                }
            });
        }
    });
    eprintln!("{} kernels compiled for {ARCHITECTURES:?}", sources.len());
}
