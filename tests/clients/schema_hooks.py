"""Hooks of schemathesis: requests that the schema allows are made ones that this server can answer, so that answers are
checked and not refusals only. Requests that break the schema go out as they are."""

import collections
import json
import os

import schemathesis
from schemathesis.generation import GenerationMode

MODEL = os.environ["MNEME_MODEL"]
QUESTION = [{"role": "user", "content": "Say yes."}]
# What is said does not matter here, so little is.
MAX_TOKENS = 4
MAX_CHOICES = 4
statuses = collections.Counter()


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict) or case.meta.generation.mode != GenerationMode.POSITIVE:
        return
    if "model" in body:
        body["model"] = MODEL
    if case.path.endswith("/embeddings"):
        # OpenAI's document types an embedding as a list of numbers; what its service answers to "base64", as this
        # server does, is a string.
        if body.get("encoding_format") == "base64":
            body["encoding_format"] = "float"
        return
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], MAX_TOKENS)
    if "completions" in case.path:
        body.setdefault("max_tokens", MAX_TOKENS)
    for name in ("n", "best_of"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], MAX_CHOICES)
    if body.get("stream") is not True:
        body.pop("stream_options", None)
    # The model's template wants text in every message.
    messages = body.get("messages") or [{}]
    if "chat" in case.path and not all(isinstance(it, dict) and isinstance(it.get("content"), str) for it in messages):
        body["messages"] = QUESTION
    # An empty prompt and none are OpenAI's separator of documents, which is a token of its models.
    if case.path.endswith("/completions") and "chat" not in case.path and not body.get("prompt"):
        body["prompt"] = "Say yes."
    # Of the model, not of the schema: it has no text to put behind the output, and hears and speaks nothing.
    for name in ("suffix", "audio", "modalities"):
        body.pop(name, None)
    # A length, or -1 for as much as there is room for; what lies between is neither, which a schema's bounds cannot say.
    if isinstance(body.get("truncate_prompt_tokens"), int):
        body["truncate_prompt_tokens"] = 64
    # OpenAI's document has a number as log-probability of the first prompt token, and there is none.
    if body.get("logprobs") is not None and "chat" not in case.path:
        body.pop("echo", None)
    # Names of cubes and adapters that this server does not have.
    for name in ("memory", "lora", "lora_path"):
        body.pop(name, None)


@schemathesis.hook
def after_call(context, case, response):
    statuses[f"{case.operation.path} {response.status_code}"] += 1
    with open(os.environ["MNEME_STATUSES"], "w") as file:
        json.dump(statuses, file)
