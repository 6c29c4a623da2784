//! The freestanding binary's scenario on the host: the same source, the same checksum.

#[path = "../freestanding/src/scenario.rs"]
mod scenario;

/// What `core/freestanding/run` compares the binary's output with.
const CHECKSUM: u64 = 0x70e4_a502_544e_b911;

#[test]
fn the_host_computes_what_the_freestanding_binary_does() {
    let sum = scenario::run().unwrap();
    assert_eq!(sum, CHECKSUM, "{sum:#018x}");
}
