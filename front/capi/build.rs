//! Gives the shared library its soname: programs linked against it ask for the ABI's version, not the file's.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libpinfold.so.0");
}
