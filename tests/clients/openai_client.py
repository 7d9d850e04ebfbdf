"""The official OpenAI client against a running server: what its users call, and what they check."""

import base64
import json
import math
import sys

import openai
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=300)
MODEL = client.models.list().data[0].id
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def models():
    assert client.models.retrieve(MODEL).id == MODEL
    try:
        client.models.retrieve("no-such-model")
        raise AssertionError("an unknown model was found")
    except openai.NotFoundError as error:
        assert error.status_code == 404


def chat():
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=32)
    choice = answer.choices[0]
    assert "Paris" in choice.message.content, choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return choice.message.content


def stream(whole):
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=32, stream=True,
        stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole, (text, whole)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0


def several_and_stop():
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, temperature=1.0, seed=7, max_tokens=12, stop=["."])
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all("." not in choice.message.content for choice in answer.choices)
    again = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, temperature=1.0, seed=7, max_tokens=12, stop=["."])
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def logprobs():
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3)
    for token in answer.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert math.isclose(token.top_logprobs[0].logprob, token.logprob)
        assert bytes(token.bytes).decode() == token.token


def completions():
    answer = client.completions.create(model=MODEL, prompt=["One, two,", "Red, green,"], temperature=0, max_tokens=8,
                                       echo=True, logprobs=2)
    assert [choice.text.split(",")[0] for choice in answer.choices] == ["One", "Red"]
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)


def json_schema():
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20},
                                               "population": {"type": "integer"}},
              "required": ["city", "population"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Name a city and its population."}], temperature=0,
        max_tokens=120, response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}})
    found = json.loads(answer.choices[0].message.content)
    assert isinstance(found["city"], str) and isinstance(found["population"], int), found


def tools():
    tool = {"type": "function", "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
        "additionalProperties": False}}}
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is the weather in Rome?"}], tools=[tool],
        tool_choice={"type": "function", "function": {"name": "get_weather"}}, temperature=0, max_tokens=80)
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)


def embeddings():
    numbers = client.embeddings.create(model=MODEL, input=["the sea", "the ocean", "a wrench"], encoding_format="float")
    vectors = [item.embedding for item in numbers.data]
    assert all(math.isclose(sum(x * x for x in v), 1.0, abs_tol=1e-4) for v in vectors)
    coded = client.embeddings.with_raw_response.create(model=MODEL, input="the sea", encoding_format="base64")
    data = json.loads(coded.text)["data"][0]["embedding"]
    assert len(base64.b64decode(data)) == 4 * len(vectors[0])


def errors():
    for wrong, field in [({"temperature": 9}, "temperature"), ({"top_p": 7}, "top_p"), ({"n": 0}, "n")]:
        try:
            client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=1, **wrong)
            raise AssertionError(f"{wrong} was accepted")
        except openai.BadRequestError as error:
            assert error.param == field, (error.param, field)
    try:
        client.completions.create(model=MODEL, prompt="word " * 20000, max_tokens=1)
        raise AssertionError("a prompt longer than the context was accepted")
    except openai.BadRequestError as error:
        assert "8192" in str(error)


models()
print("models: passed")
text = chat()
print("chat: passed")
stream(text)
print("stream: passed")
for check in [several_and_stop, logprobs, completions, json_schema, tools, embeddings, errors]:
    check()
    print(f"{check.__name__}: passed")
