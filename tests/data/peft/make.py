#!/usr/bin/env python3
"""Writes this folder's model, adapters and outputs; README.md says what they are. Takes no argument."""

import json
import pathlib
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = pathlib.Path(__file__).resolve().parent
SEED = 20
VOCAB = 160
NUM_OUTPUT = 8
PROMPT_LENGTHS = (1, 9, 24, 40)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "first": LoraConfig(r=4, lora_alpha=8, target_modules=ALL),
    "second": LoraConfig(r=10, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
}
COMPOSED = {"first": 0.7, "second": -0.5}
# Of the embedding and the output projection too; drawn behind all else.
AROUND = LoraConfig(r=6, lora_alpha=9, target_modules=["embed_tokens", "lm_head", "q_proj"])
AROUND_COMPOSED = {"first": 0.6, "around": 1.2}
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)


def fill(parameters):
    """Normal numbers that bf16 holds, of a scale that keeps logits a few units apart."""
    for name, parameter in sorted(parameters):
        mean, scale = 0.0, 1.5 / parameter.shape[-1] ** 0.5
        if "norm" in name:
            mean, scale = 1.0, 0.2
        elif "lora_embedding_A" in name:
            # Looked up, not summed over.
            scale = 0.3
        elif "lora_embedding_B" in name:
            scale = 0.3 / parameter.shape[-1] ** 0.5
        elif "lora_B" in name:
            scale = 0.3 / parameter.shape[-1] ** 0.5
        elif "lora_A" in name:
            scale = 1.0 / parameter.shape[-1] ** 0.5
        elif "embed" in name:
            scale = 0.3
        numbers = mean + scale * torch.randn(parameter.shape)
        parameter.data = numbers.to(torch.bfloat16).to(torch.float32)


def make_base():
    model = LlamaForCausalLM(CONFIG)
    fill(model.named_parameters())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(FOLDER / "base")
    (FOLDER / "base/generation_config.json").unlink(missing_ok=True)
    return load_base()


def load_base():
    return LlamaForCausalLM.from_pretrained(FOLDER / "base", dtype=torch.float32, attn_implementation="eager").eval()


def make_adapter(name, config):
    model = get_peft_model(load_base(), config)
    fill((key, value) for key, value in model.named_parameters() if "lora_" in key)
    target = FOLDER / name
    model.to(torch.bfloat16).save_pretrained(target)
    facts = json.loads((target / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = None
    facts["target_modules"].sort()
    (target / "adapter_config.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    (target / "README.md").unlink(missing_ok=True)


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


def write_outputs(name, model, prompts):
    records = [record(model, prompt) for prompt in prompts]
    text = json.dumps({"probe_ids": [], "records": records}, separators=(",", ":"))
    (FOLDER / f"{name}.json").write_text(text + "\n")


def main():
    torch.manual_seed(SEED)
    for name in ("base", *ADAPTERS, "around"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    base = make_base()
    for name, config in ADAPTERS.items():
        make_adapter(name, config)
    prompts = [torch.randint(0, VOCAB, (length,)).tolist() for length in PROMPT_LENGTHS]
    write_outputs("base", base, prompts)

    first, *others = ADAPTERS
    model = PeftModel.from_pretrained(load_base(), FOLDER / first, adapter_name=first).eval()
    for name in others:
        model.load_adapter(FOLDER / name, adapter_name=name)
    model = model.to(torch.float32)
    model.add_weighted_adapter(list(COMPOSED), list(COMPOSED.values()), "composed", combination_type="cat")
    for name in (*ADAPTERS, "composed"):
        model.set_adapter(name)
        write_outputs(name, model, prompts)

    make_adapter("around", AROUND)
    model = PeftModel.from_pretrained(load_base(), FOLDER / "around", adapter_name="around").eval()
    model.load_adapter(FOLDER / "first", adapter_name="first")
    model = model.to(torch.float32)
    weights = (list(AROUND_COMPOSED), list(AROUND_COMPOSED.values()))
    model.add_weighted_adapter(*weights, "around-composed", combination_type="cat")
    for name in ("around", "around-composed"):
        model.set_adapter(name)
        write_outputs(name, model, prompts)


if __name__ == "__main__":
    main()
