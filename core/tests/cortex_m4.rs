//! The Cortex-M4 image's scenario on the host: the same source, the same checksum.

#[path = "../cortex-m4/src/scenario.rs"]
mod scenario;

/// What `.ci/cortex-m` compares the image's output with.
const CHECKSUM: u64 = 0xf028_ccae_ce12_3d89;

#[test]
fn the_host_computes_what_the_cortex_m4_does() {
    let sum = scenario::run(&mut Box::new(scenario::Memory::ZEROED)).unwrap();
    assert_eq!(sum, CHECKSUM, "{sum:#018x}");
}
