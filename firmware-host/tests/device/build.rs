//! Collects the log strings in the binary.
fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let script = format!("{directory}/../../../core/freestanding/defmt.x");
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rustc-link-arg-bins=-T{script}");
    // Addresses in .defmt are indices, which are to stay what they are.
    println!("cargo:rustc-link-arg-bins=-no-pie");
}
