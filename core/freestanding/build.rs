//! Links without the C runtime: the binary brings its own `_start`. With the feature `defmt`, collects the log strings.
fn main() {
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rerun-if-changed=defmt.x");
    if std::env::var_os("CARGO_FEATURE_DEFMT").is_some() {
        let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        println!("cargo:rustc-link-arg-bins=-T{directory}/defmt.x");
    }
}
