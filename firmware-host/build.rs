//! With the feature `defmt`, collects the log strings in the binary.
fn main() {
    println!("cargo:rerun-if-changed=../core/freestanding/defmt.x");
    if std::env::var_os("CARGO_FEATURE_DEFMT").is_some() {
        let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        println!("cargo:rustc-link-arg-bins=-T{directory}/../core/freestanding/defmt.x");
        // Addresses in .defmt are indices, which are to stay what they are.
        println!("cargo:rustc-link-arg-bins=-no-pie");
    }
}
