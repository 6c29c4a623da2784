//! Memory, known before anything is loaded.
//!
//! A [`Planner`] needs a model's header alone. For a [`Workload`] it gives a [`MemoryPlan`]: bytes by part. The cache is
//! allocated to the byte as planned; buffers that grow with use are counted at their largest, so that the heap never
//! holds more than [`MemoryPlan::heap`]. Against a budget it finds the longest context, the largest batch and the smallest
//! λ that fit.
//!
//! Not planned is the program itself: its code, the stacks of its threads, and the tokenizer, which is there before a
//! plan is.
//!
//! ```no_run
//! use std::path::Path;
//! use thinkey::{plan::{Planner, Workload}, weights::Checkpoint};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open(Path::new("model.gguf"))?;
//! let planner = Planner::new(&checkpoint, None);
//! let workload = Workload {
//!     context: 8192,
//!     prompt: None,
//!     slots: 1,
//!     policy: "think,lambda=.6,keys=int8".parse()?,
//!     recent: 32,
//!     window: 32,
//!     threads: 4,
//! };
//! println!("{} bytes", planner.plan(&workload)?.total());
//! println!("{:?} tokens fit 1 GiB", planner.longest_context(&workload, 1 << 30));
//! # Ok(())
//! # }
//! ```

mod device;
mod fit;
mod memory;
mod shape;
mod size;
mod traffic;

pub use memory::{MemoryPlan, Planner, WeightBytes, Workload};
pub use shape::{ModelShape, ShapeError};
pub use size::{Size, SizeError};
