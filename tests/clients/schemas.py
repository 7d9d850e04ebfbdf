"""Requests made from OpenAPI documents against a running server: no request is the server's failure, and every answer
is what the document promises. Uses the server's own document and, where it is at hand, OpenAI's.

    schemas.py URL_OF_V1 [OPENAI_DOCUMENT]
"""

import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

HERE = pathlib.Path(__file__).parent
# A run takes seconds, on a busy machine a minute; one that takes this long hangs.
TIMEOUT_SECONDS = 100
# Requests of a path that must have been answered with 200 for the answers to count as checked.
LEAST_ANSWERED = 1


def run(document, base_url, answered, *options):
    """Runs the examples of a document and its boundary values; `answered` paths must have said something."""
    with tempfile.TemporaryDirectory() as folder:
        statuses = pathlib.Path(folder, "statuses.json")
        environment = dict(os.environ, PYTHONPATH=str(HERE), SCHEMATHESIS_HOOKS="schema_hooks",
                           MNEME_MODEL=model(base_url), MNEME_STATUSES=str(statuses))
        command = [pathlib.Path(sys.executable).with_name("st"), "run", document, "--url", base_url,
                   "--phases", "examples,coverage", "--checks", "not_a_server_error,response_schema_conformance",
                   "--seed", "1", "--generation-deterministic", "--no-color", *options]
        outcome = subprocess.run(command, cwd=folder, env=environment, timeout=TIMEOUT_SECONDS,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert outcome.returncode == 0, outcome.stdout
        found = collections.Counter(json.loads(statuses.read_text()))
    for path in answered:
        assert found[f"{path} 200"] >= LEAST_ANSWERED, (path, found)
    num_answered = sum(count for name, count in found.items() if name.endswith(" 200"))
    print(f"{document}: {found.total()} requests, {num_answered} answered, no contradiction")


def model(base_url):
    root = base_url.removesuffix("/v1")
    with urllib.request.urlopen(f"{root}/v1/models") as answer:
        return json.load(answer)["data"][0]["id"]


def main(url, openai_document=None):
    root = url.removesuffix("/v1")
    run(f"{root}/openapi.json", root, ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"])
    if openai_document is None or not pathlib.Path(openai_document).exists():
        return print("skipped: OpenAI's own document is not at hand")
    served = ["/chat/completions", "/completions", "/embeddings"]
    run(openai_document, url, served, "--include-path-regex", "^/(chat/completions|completions|embeddings|models)$")


main(*sys.argv[1:])
