//! CUDA's headers: what kernels are compiled with when they are first run.

use super::{CudaError, Version};
use std::path::{Path, PathBuf};

/// A folder with CUDA's headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The folder.
    pub path: PathBuf,
    /// The version that they are of, where they tell.
    pub version: Option<Version>,
}

impl Headers {
    /// Those that cubecl takes: in `CUDA_PATH`, or else where toolkits are installed.
    ///
    /// # Errors
    /// [`CudaError::Headers`] where there are none; cubecl does not look any further.
    pub fn find() -> Result<Self, CudaError> {
        let toolkit = std::env::var("CUDA_PATH").map(PathBuf::from).unwrap_or_else(|_| {
            let usual = ["/usr/local/cuda", "/opt/cuda"].map(PathBuf::from);
            // Last, a distribution's own packages.
            let usr = Path::new("/usr/bin/nvcc").exists().then(|| PathBuf::from("/usr"));
            usual.into_iter().find(|path| path.exists()).or(usr).unwrap_or_else(|| PathBuf::from("/usr/local/cuda"))
        });
        Self::in_folder(toolkit.join("include"))
    }

    /// Those in the folder `path`.
    ///
    /// # Errors
    /// [`CudaError::Headers`] where there are none.
    pub fn in_folder(path: PathBuf) -> Result<Self, CudaError> {
        if !path.join("cuda_runtime.h").exists() {
            return Err(CudaError::Headers { path });
        }
        let version = std::fs::read_to_string(path.join("cuda.h")).ok().and_then(|text| version(&text));
        Ok(Self { path, version })
    }
}

/// The version that `cuda.h` defines.
fn version(header: &str) -> Option<Version> {
    let defined = header.lines().find_map(|line| line.strip_prefix("#define CUDA_VERSION"))?;
    defined.trim().parse().ok().map(Version::of_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_defined() {
        let header = "/** \\def CUDA_VERSION of this header */\n#define CUDA_VERSION 12060\n#define CUDA_VERSIONS 1\n";
        assert_eq!(version(header), Some(Version { major: 12, minor: 6 }));
        assert_eq!(version("#define CUDA_VERSION twelve"), None);
        assert_eq!(version(""), None);
    }

    #[test]
    fn a_folder_without_headers_is_named() {
        let path = PathBuf::from("/nonexistent/include");
        assert_eq!(Headers::in_folder(path.clone()), Err(CudaError::Headers { path }));
    }
}
