//! What `thinkey doctor` tells of CUDA: in a build without it, whether a build with it could be of use.

use serde_json::Value;
use thinkey::machine::Machine;

#[cfg(feature = "cuda")]
pub use built::Cuda;
#[cfg(not(feature = "cuda"))]
pub use not_built::Cuda;

/// The row of NVIDIA's kernel module.
fn module(machine: &Machine) -> Option<(&'static str, String)> {
    machine.nvidia_module.as_ref().map(|version| ("NVIDIA driver", version.clone()))
}

#[cfg(not(feature = "cuda"))]
mod not_built {
    use super::{Machine, Value, module};

    /// Nothing is looked for.
    pub struct Cuda;

    impl Cuda {
        pub fn look() -> Self {
            Self
        }

        pub fn json(&self) -> Value {
            Value::Null
        }

        pub fn rows(&self, machine: &Machine) -> Vec<(&'static str, String)> {
            module(machine).into_iter().collect()
        }

        pub fn advice(&self, machine: &Machine) -> Vec<String> {
            match machine.nvidia_module {
                Some(_) => vec![
                    "There is an NVIDIA driver: a program built with `--features cuda` would tell whether it can be used."
                        .to_owned(),
                ],
                None => Vec::new(),
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_driver_is_worth_a_build_with_cuda() {
            let machine = Machine { nvidia_module: Some("540.4.0".to_owned()), ..Machine::default() };
            assert_eq!(Cuda.rows(&machine), [("NVIDIA driver", "540.4.0".to_owned())]);
            assert!(Cuda.advice(&machine)[0].contains("--features cuda"));
            assert!(Cuda.rows(&Machine::default()).is_empty() && Cuda.advice(&Machine::default()).is_empty());
        }
    }
}

#[cfg(feature = "cuda")]
mod built {
    use super::{Machine, Value, module};
    use indicatif::HumanBytes;
    use serde_json::json;
    use thinkey_kernels::cuda::{Gpu, Headers, Survey, Version, survey};

    /// All that there is.
    pub struct Cuda(Survey);

    impl Cuda {
        pub fn look() -> Self {
            Self(survey())
        }

        pub fn json(&self) -> Value {
            let Survey { driver, devices, compiler, headers, .. } = &self.0;
            let version = |version: &Option<Version>| version.map(|version| version.to_string());
            let device = |gpu: &Gpu| {
                json!({
                    "name": gpu.name, "compute_capability": gpu.capability.to_string(),
                    "architecture": gpu.capability.architecture(), "unified_memory": gpu.unified,
                    "memory_bytes": gpu.total, "free_bytes": gpu.free, "multiprocessors": gpu.multiprocessors,
                    "warp": gpu.warp, "bandwidth": gpu.bandwidth, "stream_ordered_allocator": gpu.pools,
                })
            };
            let headers =
                headers.as_ref().map(|Headers { path, version: of }| json!({ "path": path, "version": version(of) }));
            json!({
                "driver": version(driver), "compiler": version(compiler), "headers": headers,
                "devices": devices.iter().map(device).collect::<Vec<_>>(),
            })
        }

        pub fn rows(&self, machine: &Machine) -> Vec<(&'static str, String)> {
            let Survey { driver, devices, compiler, headers, .. } = &self.0;
            let mut rows: Vec<_> = module(machine).into_iter().collect();
            let version =
                |version: &Option<Version>| version.map_or_else(|| "not found".to_owned(), |it| it.to_string());
            let headers = match headers {
                Some(Headers { path, version: Some(version) }) => format!("{version} ({})", path.display()),
                Some(Headers { path, version: None }) => format!("of an unknown version ({})", path.display()),
                None => "not found".to_owned(),
            };
            rows.push((
                "CUDA",
                format!("driver {}, compiler {}, headers {headers}", version(driver), version(compiler)),
            ));
            rows.extend(devices.iter().enumerate().map(|(index, gpu)| {
                let bytes = |bytes: usize| HumanBytes(bytes as u64);
                let unified = if gpu.unified { "the processor's memory, " } else { "" };
                let free = gpu.free.map(|free| format!(", {} free", bytes(free))).unwrap_or_default();
                let speed = gpu.bandwidth.map(|speed| format!(", {:.0} GB/s", speed / 1e9)).unwrap_or_default();
                let used = if index == 0 { "" } else { " (not used)" };
                let text = format!(
                    "{}, compute capability {}, {} multiprocessors; {unified}{}{free}{speed}{used}",
                    gpu.name,
                    gpu.capability,
                    gpu.multiprocessors,
                    bytes(gpu.total)
                );
                ("  device", text)
            }));
            rows
        }

        pub fn advice(&self, _: &Machine) -> Vec<String> {
            let Survey { driver, compiler, headers, .. } = &self.0;
            let of_headers = headers.as_ref().and_then(|headers| headers.version);
            let mut advice = Vec::new();
            if let (Some(compiler), Some(headers)) = (compiler, of_headers)
                && *compiler != headers
            {
                advice.push(format!(
                    "CUDA's compiler is of {compiler} and its headers of {headers}: take both from one toolkit \
                     (LD_LIBRARY_PATH and CUDA_PATH)."
                ));
            }
            if let (Some(driver), Some(compiler)) = (driver, compiler)
                && compiler.major > driver.major
            {
                advice.push(format!(
                    "CUDA's compiler is of {compiler} and the driver serves {driver}: what the one makes the other may not \
                     load. Update the driver, or take an older toolkit."
                ));
            }
            advice
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn version(major: u32, minor: u32) -> Option<Version> {
            Some(Version { major, minor })
        }

        fn orin() -> Survey {
            let gpu = Gpu {
                name: "Orin".to_owned(),
                capability: Version { major: 8, minor: 7 },
                unified: true,
                total: 64 << 30,
                free: Some(60 << 30),
                multiprocessors: 16,
                warp: 32,
                bandwidth: Some(204.8e9),
                pools: true,
            };
            let headers = Headers { path: "/usr/local/cuda/include".into(), version: version(12, 6) };
            Survey {
                driver: version(12, 6),
                devices: vec![gpu],
                compiler: version(12, 6),
                headers: Some(headers),
                obstacle: None,
            }
        }

        #[test]
        fn an_orin_is_told() {
            let cuda = Cuda(orin());
            let rows = cuda.rows(&Machine { nvidia_module: Some("540.4.0".to_owned()), ..Machine::default() });
            assert_eq!(rows[0], ("NVIDIA driver", "540.4.0".to_owned()));
            assert_eq!(rows[1].1, "driver 12.6, compiler 12.6, headers 12.6 (/usr/local/cuda/include)");
            let device = "Orin, compute capability 8.7, 16 multiprocessors; the processor's memory, 64.00 GiB, 60.00 GiB free, \
                          205 GB/s";
            assert_eq!(rows[2].1, device);
            assert!(cuda.advice(&Machine::default()).is_empty());
            let json = cuda.json();
            assert_eq!(json["devices"][0]["architecture"], "sm_87");
            assert_eq!(json["headers"]["version"], "12.6");
        }

        #[test]
        fn parts_of_two_toolkits_are_pointed_out() {
            let mixed = Survey { compiler: version(13, 0), ..orin() };
            let advice = Cuda(mixed).advice(&Machine::default());
            assert!(advice[0].contains("of 13.0 and its headers of 12.6"), "{advice:?}");
            assert!(advice[1].contains("the driver serves 12.6"), "{advice:?}");
            let bare = Cuda(Survey::default());
            assert_eq!(bare.rows(&Machine::default())[0].1, "driver not found, compiler not found, headers not found");
            assert!(bare.advice(&Machine::default()).is_empty());
        }
    }
}
