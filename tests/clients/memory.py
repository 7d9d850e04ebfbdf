"""MemCubes through the official OpenAI client: made before a kill, named by chats before and after it.

    memory.py URL make          makes a cube and prints what a chat that names it answers
    memory.py URL use ANSWER    the same chat must restore the cube's KV and give the same answer
"""

import json
import sys
from urllib.request import Request, urlopen

from openai import NotFoundError, OpenAI

url, phase = sys.argv[1:3]
client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
MODEL = client.models.list().data[0].id
NAME = "team/handbook"
TEXT = "The office of Umbrella Corp opens at 9:17 and the code of its door is 4471. " * 20
QUESTION = [{"role": "user", "content": "When does the office open?"}]


def ask(model=MODEL, **memory):
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_completion_tokens=24, extra_body=memory
    )
    return answer.choices[0].message.content, answer.usage.prompt_tokens_details, answer.memory


def make():
    cube = client.post("/memcubes", body={"name": NAME, "text": TEXT}, cast_to=object)
    assert cube["computed_tokens"] > 400 and cube["restored_tokens"] == 0, cube
    text, details, memory = ask(memory={"cubes": [NAME]})
    assert "9:17" in text, text
    assert details.device_cached_tokens > 400 and memory["exact"], (details, memory)
    again = client.post("/memcubes", body={"name": "team/copy", "text": TEXT}, cast_to=object)
    assert again["restored_tokens"] > 400 and again["computed_tokens"] < 32, again
    _, _, memory = ask(memory={"save": {"name": "team/session"}})
    saved = memory["saved"]
    assert saved["version"] == 1 and saved["computed_tokens"] < 32, saved
    assert client.get("/memcubes/team/session", cast_to=object)["binding"]["num_tokens"] == saved["num_tokens"]
    travel("team/session", "team/again")
    print(text)


def travel(name, new_name):
    """A cube as a file, out of the server and in again."""
    file = urlopen(Request(f"{url}/memcubes/{name}/export", method="POST", data=b"")).read()
    headers = {"Content-Type": "application/octet-stream"}
    arrived = urlopen(Request(f"{url}/memcubes/import?name={new_name}", method="POST", data=file, headers=headers))
    cube = json.load(arrived)
    assert cube["restored_tokens"] > 0 and cube["computed_tokens"] == 0, cube


def use(wanted):
    listed = client.get("/memcubes", cast_to=object)["data"]
    assert [cube["name"] for cube in listed] == ["team/again", "team/copy", NAME, "team/session"], listed
    text, details, memory = ask(memory={"cubes": [NAME]})
    assert text == wanted, (text, wanted)
    assert details.storage_cached_tokens > 400 and memory["decision"] == "fetched", (details, memory)
    text, details, _ = ask(model=f"{MODEL}@{NAME}")
    assert text == wanted and details.device_cached_tokens > 400, (text, details)
    client.delete(f"/memcubes/{NAME}", cast_to=object)
    try:
        ask(memory={"cubes": [NAME]})
        raise AssertionError("a deleted cube was found")
    except NotFoundError as error:
        assert error.param == "memory.cubes", error.param
    print("memory: passed")


make() if phase == "make" else use(sys.argv[3])
