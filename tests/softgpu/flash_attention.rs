//! The engine with prompts by candle-flash-attn: answers are near the CPU's, and decode steps are replayed. For a driver that
//! was named and a program that was built with it.

use mneme::backend::DType;

use crate::families::{check_tokens, tolerances};
use crate::graphs;
use crate::support::engine::{Setup, TestEngine, collect};
use crate::support::softgpu;
use crate::support::tiny_model::{Family, TinyModel};

#[test]
fn answers_are_near_the_cpus_and_steps_are_replayed() {
    for (family, dtype) in [(Family::Llama, DType::BF16), (Family::Gemma3, DType::F16)] {
        let model = TinyModel::new(family, 17).write();
        let Some(backend) = softgpu::flash_backend(dtype) else { return };
        let (found, num_replayed) = graphs::run(backend, model.path(), dtype);
        assert!(num_replayed >= 8, "only {num_replayed} steps were replayed");
        let exact = Setup { dtype: Some(DType::F32), kv_dtype: DType::F32, ..Setup::default() };
        let cpu = TestEngine::start_on_cpu(model.path(), exact);
        let requests = graphs::requests();
        for (at, (prompt, sampling)) in requests.into_iter().enumerate().filter(|(_, (_, s))| s.seed.is_none()) {
            let on_cpu = collect(cpu.submit(&prompt, sampling));
            check_tokens(&found[at], &on_cpu, tolerances(dtype).0, &format!("{family:?}, request {at}"));
        }
    }
}
