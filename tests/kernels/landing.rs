//! Blocks that land layer by layer: their bytes are there for who has waited for the layer's event, and the software GPU
//! reports who has not.

use std::process::Command;

use mneme::Result;
use mneme::backend::{BufferCopy, DType, Device, KvLayout, KvOrder, LandingBlock, StreamKind, Tensor, Transfer};

use crate::gpu::Gpu;
use crate::support::random::Random;
use crate::support::softgpu;

/// Of the host's blocks, where each goes: the first two follow each other on both sides.
const TARGETS: [usize; 4] = [2, 3, 0, 5];
const NUM_BLOCKS: usize = 6;

/// Set in a process that does not wait for this layer.
const VARIABLE: &str = "MNEME_TEST_WITHOUT_WAIT_FOR";

/// Brings blocks up and copies what landed on another stream, layer by layer. What was sent and what was found, or what
/// waiting came to.
fn land(gpu: &Gpu, layout: &KvLayout, not_awaited: Option<usize>) -> Result<(Vec<u8>, Vec<u8>)> {
    let block_bytes = layout.block_bytes();
    let mut transfer = gpu.backend.create_transfer()?;
    let mut host = transfer.allocate_host_blocks(TARGETS.len(), block_bytes)?.unwrap();
    let mut random = Random::new(1);
    host.iter_mut().for_each(|block| block.as_mut().fill_with(|| random.below(256) as u8));
    let [arena, found] = [(); 2].map(|()| gpu.backend.allocate(NUM_BLOCKS * block_bytes).unwrap());
    let target = |(source, block): (_, &usize)| LandingBlock { source, target_offset: block * block_bytes };
    let blocks: Vec<_> = host.iter().zip(&TARGETS).map(target).collect();
    let landing = transfer.land(&arena, layout, &blocks)?;
    let stream = gpu.backend.create_stream(StreamKind::Compute)?;
    for layer in 0..layout.num_layers() {
        if let Some(event) = landing.event_before(layer).filter(|_| not_awaited != Some(layer)) {
            gpu.backend.wait(&stream, event)?;
        }
        for block in TARGETS {
            let bytes = layout.layer_bytes(layer, layer + 1);
            let offset = block * block_bytes + bytes.start;
            let copy = BufferCopy {
                source: &arena,
                source_offset: offset,
                target: &found,
                target_offset: offset,
                bytes: bytes.len(),
            };
            gpu.backend.copy(&stream, &copy)?;
        }
    }
    gpu.backend.synchronize(&gpu.backend.record(&stream)?)?;
    transfer.finish()?;
    let found = gpu.download(&Tensor::new(found, 0, 1, NUM_BLOCKS * block_bytes / 4, DType::F32));
    let mut sent = vec![0; found.len()];
    for (block, at) in host.iter().zip(TARGETS) {
        sent[at * block_bytes..][..block_bytes].copy_from_slice(block.as_ref());
    }
    Ok((sent, found))
}

/// An event for every layer, and for every few.
fn layouts() -> [KvLayout; 2] {
    [3, 17].map(|layers| KvLayout::with_order(KvOrder::Rows, layers, 1, 32, 16, DType::BF16).unwrap())
}

#[test]
fn landed_blocks_have_the_bytes_of_the_host() {
    let gpu = Gpu::new(DType::BF16);
    for layout in layouts() {
        let (sent, found) = land(&gpu, &layout, None).unwrap();
        assert!(sent == found, "{} layers", layout.num_layers());
    }
}

#[test]
fn who_does_not_wait_for_a_layer_is_reported() {
    let [layout, _] = layouts();
    if let Ok(layer) = std::env::var(VARIABLE) {
        land(&Gpu::new(DType::BF16), &layout, Some(layer.parse().unwrap())).unwrap();
        return;
    }
    softgpu::end_without_kernels();
    if softgpu::is_replaced() {
        return;
    }
    for layer in 0..layout.num_layers() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["landing::who_does_not_wait", "--nocapture"]).env(VARIABLE, layer.to_string());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("StreamOrder"), "layer {layer}: {text}");
    }
}
