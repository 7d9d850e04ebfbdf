//! Gives the library the name by which every CUDA program looks for its driver.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // Programs probe for the driver by opening and closing it; its worker thread must survive that.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
