//! Every kernel as CUDA C++, compiled by NVRTC: nothing reaches a GPU uncompiled. No GPU takes part.

use super::{
    append, attention, flush,
    gemv::{self, Outcome, Product},
    layout::Shape,
    learn, merge,
    rotate::{self, Turn},
    score, select,
    tests::client,
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
    let array = || ArrayCompilationArg { inplace: None };
    let settings = |units: usize| KernelSettings::default().cube_dim(CubeDim::new_1d(units as u32));
    let mut sources = Vec::new();
    let mut check = |what: String, source: String| sources.push((what, source));
    for (dim, group) in [(64, 3), (128, 4)] {
        for kind in StorageKind::ALL.into_iter().filter(|kind| !kind.halves()) {
            let shape = Shape {
                dim,
                group,
                keys: if kind.turns() { StorageKind::Int4 } else { kind },
                values: kind,
                sinks: 4,
                stride: 64,
                corrected: true,
                copies: 1,
                width: (group + 2) * dim,
                keys_at: group * dim,
                values_at: (group + 1) * dim,
            };
            let name = |kernel| format!("{kernel} of {dim} channels in {}", kind.name());
            type R = WgpuRuntime;
            let (a, b) = (attention::UNITS, score::UNITS);
            let kernel = attention::attend::Attend::<R>::new(
                settings(a),
                client(),
                array(),
                array(),
                array(),
                array(),
                array(),
                array(),
                shape,
                32,
            );
            check(name("attend"), source(&kernel));
            let kernel = flush::flush::Flush::<R>::new(
                settings(flush::UNITS),
                client(),
                array(),
                array(),
                array(),
                array(),
                array(),
                array(),
                shape,
            );
            check(name("flush"), source(&kernel));
            // These know the numbers of the ring alone.
            if StorageKind::from(kind.ring()) == kind {
                let kernel = attention::thin_queries::ThinQueries::<R>::new(
                    settings(a),
                    client(),
                    array(),
                    array(),
                    array(),
                    array(),
                    array(),
                    array(),
                    (),
                    shape,
                );
                check(name("thin_queries"), source(&kernel));
                let kernel = score::key_energies::KeyEnergies::<R>::new(
                    settings(b),
                    client(),
                    array(),
                    array(),
                    array(),
                    array(),
                    array(),
                    shape,
                    false,
                );
                check(name("key_energies"), source(&kernel));
                let units = settings(append::UNITS);
                let kernel =
                    append::append::Append::<R>::new(units, client(), array(), array(), array(), array(), shape);
                check(name("append"), source(&kernel));
                let units = settings(score::UNITS);
                let kernel =
                    learn::means::Means::<R>::new(units, client(), array(), array(), array(), array(), array(), shape);
                check(name("means"), source(&kernel));
                let units = settings(score::UNITS);
                let kernel = learn::whole_keys::WholeKeys::<R>::new(
                    units,
                    client(),
                    array(),
                    array(),
                    array(),
                    (),
                    (),
                    (),
                    shape,
                );
                check(name("whole_keys"), source(&kernel));
            }
            // And these only how many numbers there are.
            if kind == StorageKind::F32 {
                let kernel = score::query_energies::QueryEnergies::<R>::new(
                    settings(b),
                    client(),
                    array(),
                    array(),
                    array(),
                    array(),
                    shape,
                );
                check(name("query_energies"), source(&kernel));
                let kernel = select::select_channels::SelectChannels::<R>::new(
                    settings(b),
                    client(),
                    array(),
                    array(),
                    array(),
                    array(),
                    array(),
                    (),
                    shape,
                    true,
                );
                check(name("select_channels"), source(&kernel));
                let kernel = merge::merge::Merge::<R>::new(
                    settings(a),
                    client(),
                    array(),
                    array(),
                    array(),
                    (),
                    dim,
                    group,
                    true,
                );
                check(name("merge"), source(&kernel));
                let units = settings(score::UNITS);
                let kernel = score::sketch_energies::SketchEnergies::<R>::new(
                    units,
                    client(),
                    array(),
                    array(),
                    array(),
                    array(),
                    array(),
                    array(),
                    (),
                    shape,
                );
                check(name("sketch_energies"), source(&kernel));
                let units = settings(score::UNITS);
                let kernel = learn::place::Place::<R>::new(units, client(), array(), array(), array());
                check(name("place"), source(&kernel));
                let turn = Turn { heads: group, dim, width: (group + 2) * dim, adjacent: group == 3, normed: true };
                let kernel = rotate::rotate::Rotate::<R>::new(
                    settings(rotate::UNITS),
                    client(),
                    array(),
                    array(),
                    array(),
                    array(),
                    array(),
                    (),
                    turn,
                );
                check(name("rotate"), source(&kernel));
            }
        }
    }
    for format in WeightFormat::ALL {
        let packed = Packed { format, cols: 1536 };
        for (rows, normed, biased, outcome) in [(1, true, false, Outcome::Gated), (8, true, true, Outcome::Stored)] {
            let product = Product { packed, rows, normed, biased, outcome, plane: 32 };
            let kernel = gemv::gemv::Gemv::<WgpuRuntime>::new(
                settings(weights::UNITS),
                client(),
                array(),
                array(),
                array(),
                array(),
                array(),
                (),
                (),
                (),
                (),
                (),
                (),
                (),
                product,
            );
            check(format!("gemv of {rows} rows in {}", format.name()), source(&kernel));
        }
        let kernel = weights::dequantise::Dequantise::<WgpuRuntime>::new(
            settings(weights::UNITS),
            client(),
            array(),
            array(),
            array(),
            (),
            (),
            packed,
            false,
        );
        check(format!("dequantise of {}", format.name()), source(&kernel));
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
