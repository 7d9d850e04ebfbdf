#!/usr/bin/env python3
"""Writes this folder's outputs of transformers; README.md says of what. Takes no argument."""

import json
import pathlib

import numpy
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

FOLDER = pathlib.Path(__file__).resolve().parent
WEIGHTS_SEED, PROMPTS_SEED = 11, 3
NUM_OUTPUT = 8
PROMPT_LENGTHS = (1, 9, 40, 100)
# Of attention scores and of logits: those of the published models, and such as most numbers are beyond.
CAPS = {"wide": (50.0, 30.0), "narrow": (2.0, 3.0)}
VOCAB, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 300, 64, 96, 4, 2, 16, 3


class Random:
    """That of tests/support/random.rs."""

    def __init__(self, seed):
        self.state = (seed * 0x2545F4914F6CDD1D) % 2**64 ^ 0x9E3779B9

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = (self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def normal(self):
        total = 0.0
        for _ in range(12):
            total += (self.next() >> 11) / 2**53
        return total - 6.0

    def tokens(self, count):
        return [self.next() % VOCAB for _ in range(count)]


def rounded(numbers):
    """The nearest bf16, ties to even; as Rust's `half`, which does not look at the last 32 bits."""
    bits = numpy.array(numbers, dtype=numpy.float64).view(numpy.uint64)
    one, shift, unseen = numpy.uint64(1), numpy.uint64(45), numpy.uint64(32)
    bits = bits >> unseen << unseen
    bits = (bits + (one << (shift - one)) - one + ((bits >> shift) & one)) >> shift << shift
    return torch.from_numpy(bits.view(numpy.float64).astype(numpy.float32))


def weights():
    """Those of tests/support/tiny_model.rs, in its order."""
    random, tensors = Random(WEIGHTS_SEED), {}

    def draw(name, shape, scale, mean=0.0):
        count = int(numpy.prod(shape))
        tensors[name] = rounded([mean + scale * random.normal() for _ in range(count)]).reshape(shape)

    draw("model.embed_tokens.weight", (VOCAB, HIDDEN), 0.3)
    draw("model.norm.weight", (HIDDEN,), 0.2)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for part, rows, columns, gain in (
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN, 1.2),
            ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, 1.2),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, 1.5),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, 1.5),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN, 1.5),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN, 1.5),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE, 1.5),
        ):
            draw(f"{prefix}.{part}.weight", (rows, columns), gain / columns**0.5)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            draw(f"{prefix}.{norm}_layernorm.weight", (HIDDEN,), 0.2, 4.0 if norm.startswith("post_") else 0.0)
    return tensors


def load(tensors, attention_cap, logit_cap):
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        sliding_window=32,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=attention_cap,
        final_logit_softcapping=logit_cap,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    model = Gemma2ForCausalLM(config).to(torch.float32).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    model.tie_weights()
    return model


@torch.no_grad()
def record(model, prompt):
    ids, greedy, gap = list(prompt), [], []
    logits = model(torch.tensor([ids])).logits[0].float()
    behind = torch.log_softmax(logits, -1)
    prompt_logprobs = [behind[at, token].item() for at, token in enumerate(prompt[1:])]
    for _ in range(NUM_OUTPUT):
        best = model(torch.tensor([ids])).logits[0, -1].float().topk(2)
        gap.append(round((best.values[0] - best.values[1]).item(), 5))
        greedy.append(best.indices[0].item())
        ids.append(greedy[-1])
    last = logits[-1].topk(32)
    top = [[token, round(logit, 5)] for token, logit in zip(last.indices.tolist(), last.values.tolist())]
    return {
        "kind": "ids",
        "prompt": f"{len(prompt)} tokens",
        "rendered": "",
        "prompt_ids": prompt,
        "greedy_ids": greedy,
        "gap": gap,
        "top": top,
        "lse": round(torch.logsumexp(logits[-1], -1).item(), 5),
        "prompt_logprobs": [round(number, 5) for number in prompt_logprobs],
        "text": "",
    }


def main():
    tensors, random = weights(), Random(PROMPTS_SEED)
    prompts = [random.tokens(length) for length in PROMPT_LENGTHS]
    for name, caps in CAPS.items():
        model = load(tensors, *caps)
        records = [record(model, prompt) for prompt in prompts]
        text = json.dumps({"probe_ids": [], "records": records}, separators=(",", ":"))
        (FOLDER / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
