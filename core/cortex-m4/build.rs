//! Says where the memories are, and links with the scripts of cortex-m-rt and defmt.
fn main() {
    println!("cargo:rerun-if-changed=memory.x");
    println!("cargo:rustc-link-search={}", std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    for script in ["link.x", "defmt.x"] {
        println!("cargo:rustc-link-arg-bins=-T{script}");
    }
}
