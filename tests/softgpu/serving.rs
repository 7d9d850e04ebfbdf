//! `mneme serve` on a device that fails or has little memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use crate::command::driver_folder;
use crate::support::byte_tokenizer;
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel, Written};

/// A model that text can be given to.
pub(crate) fn model() -> Written {
    let model = TinyModel::new(Family::Llama, 3).write();
    let (file, config) = byte_tokenizer::files();
    std::fs::write(model.path().join("tokenizer.json"), file).unwrap();
    std::fs::write(model.path().join("tokenizer_config.json"), config).unwrap();
    model
}

/// A server, killed when dropped.
pub(crate) struct Served {
    child: Child,
    /// Lines of its log.
    lines: Receiver<String>,
    /// Those that were read.
    log: String,
    _driver: tempfile::TempDir,
}

impl Served {
    fn start(model: &Written, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_with_vault(model, &[&["--no-vault"], arguments].concat(), variables)
    }

    /// The same with the vault that the arguments name.
    pub(crate) fn start_with_vault(model: &Written, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_on("softgpu", driver_folder(), model, arguments, variables)
    }

    /// The same on a device, with the driver that lies in a folder.
    pub(crate) fn start_on(
        device: &str,
        driver: tempfile::TempDir,
        model: &Written,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mneme"));
        command.args(["serve", model.path().to_str().unwrap(), "--device", device, "--port", "0"]);
        command.args(["--served-model-name", "tiny"]);
        command.args(arguments).envs(variables.iter().copied());
        command.env("LD_LIBRARY_PATH", driver.path()).env("MNEME_LOG", "info").env_remove("MNEME_API_KEY");
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines, log: String::new(), _driver: driver }
    }

    /// Reads the log, unless that is done, up to a line with `wanted`, which it returns; an end before that fails.
    pub(crate) fn wait_for(&mut self, wanted: &str) -> String {
        if let Some(line) = self.log.lines().find(|line| line.contains(wanted)) {
            return line.to_owned();
        }
        loop {
            let Ok(line) = self.lines.recv() else { panic!("no {wanted:?} in {}", self.log) };
            self.log += &line;
            self.log.push('\n');
            if line.contains(wanted) {
                return line;
            }
        }
    }

    /// Where it listens, once it does.
    pub(crate) fn address(&mut self) -> String {
        let line = self.wait_for("mneme serves");
        line.split("http://").nth(1).unwrap().trim_end_matches("/v1").to_owned()
    }

    /// Has it end in order, so that what it computed is on disk.
    fn stop(mut self) {
        Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The answer to one request, head and all.
pub(crate) fn ask(address: &str, request: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let length = body.len();
    let head = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n");
    write!(stream, "{head}Content-Type: application/json\r\n\r\n{body}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

pub(crate) const COMPLETION: &str = r#"{"model": "tiny", "prompt": "abc", "max_tokens": 40, "temperature": 0}"#;

#[test]
fn health_says_that_the_device_is_lost() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let model = model();
    let mut served = Served::start(
        &model,
        &["--kv-cache-memory-bytes", "4M"],
        &[("SOFTGPU_FAIL", "cuGraphLaunch=719@5"), ("SOFTGPU_QUIET", "1")],
    );
    let address = served.address();
    let health = ask(&address, "GET /health", "");
    assert!(health.starts_with("HTTP/1.1 200") && health.ends_with(r#"{"status":"ok"}"#), "{health}");
    let failed = ask(&address, "POST /v1/completions", COMPLETION);
    assert!(failed.starts_with("HTTP/1.1 500"), "{failed}");
    served.wait_for("the engine has ended");
    let health = ask(&address, "GET /health", "");
    assert!(health.starts_with("HTTP/1.1 503") && health.contains("CUDA_ERROR_LAUNCH_FAILED"), "{health}");
    let refused = ask(&address, "POST /v1/completions", COMPLETION);
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
}

/// 2 GiB of KV blocks are the default.
#[test]
fn a_small_device_gets_a_small_pool() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let (model, small) = (model(), [("SOFTGPU_MEMORY_MIB", "192"), ("SOFTGPU_QUIET", "1")]);
    let mut served = Served::start(&model, &[], &small);
    let is_told = |said: &str| said.contains("2048 MiB does not fit") && said.contains("--kv-cache-memory-bytes");
    let said = served.wait_for("does not fit");
    assert!(is_told(&said), "{said}");
    let address = served.address();
    let answer = ask(&address, "POST /v1/completions", COMPLETION);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let health = ask(&address, "GET /health", "");
    assert!(health.contains(r#"{"status":"degraded","degraded":["kv_pool: "#) && is_told(&health), "{health}");
}

/// There is as much as is wanted, in pieces: a pool is one.
#[test]
fn a_device_in_pieces_gets_a_small_pool() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let (model, pieces) = (model(), [("SOFTGPU_PIECE_MIB", "48"), ("SOFTGPU_QUIET", "1")]);
    let mut served = Served::start(&model, &["--kv-cache-memory-bytes", "64M"], &pieces);
    let address = served.address();
    let answer = ask(&address, "POST /v1/completions", COMPLETION);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let health = ask(&address, "GET /health", "");
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    assert!(
        health.contains("kv_pool: the device gives no 64.0 MiB at once for the KV cache, which gets 42.9"),
        "{health}"
    );
}

/// What cannot be made smaller is said at once.
#[test]
fn a_device_without_room_is_refused() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let model = model();
    let mut served = Served::start(&model, &[], &[("SOFTGPU_MEMORY_MIB", "48"), ("SOFTGPU_QUIET", "1")]);
    served.wait_for("are free; give a smaller --kv-cache-memory-bytes");
    assert!(!served.child.wait().unwrap().success());
}

/// KV of exact products is not taken for what cuBLASLt would give, nor the other way round.
#[test]
fn a_vault_keeps_the_modes_of_products_apart() {
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    let (model, vault) = (model(), tempfile::tempdir().unwrap());
    let vault = ["--vault", vault.path().to_str().unwrap(), "--vault-size-bytes", "64M"];
    let prompt = "abcdefgh".repeat(8);
    let body = format!(r#"{{"model": "tiny", "prompt": "{prompt}", "max_tokens": 2, "temperature": 0}}"#);
    let restored = |gemm: &str| {
        let arguments = [&vault[..], &["--kv-cache-memory-bytes", "4M", "--gemm", gemm]].concat();
        let mut served = Served::start_with_vault(&model, &arguments, &[("SOFTGPU_QUIET", "1")]);
        served.wait_for("the vault is open");
        let address = served.address();
        let answer = ask(&address, "POST /v1/completions", &body);
        if !answer.starts_with("HTTP/1.1 200") {
            served.child.kill().ok();
            let rest: Vec<String> = served.lines.iter().collect();
            panic!("{gemm}: {answer} {} {rest:?}", served.log);
        }
        served.stop();
        !answer.contains(r#""storage_cached_tokens":0"#)
    };
    let found: Vec<bool> = ["exact", "cublaslt", "cublaslt", "exact"].into_iter().map(restored).collect();
    assert_eq!(found, [false, false, true, true]);
}
