//! Gives the library the name that programs look for. Not a build of anything. Invariant: the name in the file is
//! libcuda's, so that one opened by its path also answers a later search by name.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // Streams are threads of this library: its code has to stay when a program closes it.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
