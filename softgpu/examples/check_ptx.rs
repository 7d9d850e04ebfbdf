//! Says whether the software device understands PTX files: `cargo run -p softgpu --example check_ptx -- a.ptx b.fatbin`.

use softgpu::capability::capability;
use softgpu::fatbin::ptx_of_fatbin;
use softgpu::memory::Memory;
use softgpu::module::Module;

fn check(path: &str) -> Result<String, String> {
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let text = match ptx_of_fatbin(&bytes, capability()) {
        Ok(text) => text,
        Err(_) => String::from_utf8(bytes).map_err(|e| e.to_string())?,
    };
    let module = Module::load(&text, &Memory::new(1 << 30)).map_err(|e| e.to_string())?;
    let mut names: Vec<&str> = module.functions.keys().map(String::as_str).collect();
    names.sort_unstable();
    Ok(format!("{} kernels: {}", names.len(), names.join(" ")))
}

fn main() -> Result<(), String> {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        match check(&path) {
            Ok(found) => eprintln!("{path}: {found}"),
            Err(why) => {
                failed = true;
                eprintln!("{path}: {why}");
            }
        }
    }
    if failed { Err("not every file is understood".to_owned()) } else { Ok(()) }
}
