"""instructor: models of pydantic out of "chat" and "messages", by a forced tool and by a schema, whole and in pieces."""

from typing import Literal

import anthropic
import instructor
import openai
from case import GOOD, HI, MODEL, PLACE, RECITE, URL, VARIANT, case, refusals, run
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str
    age: int = Field(ge=0, le=150)
    kind: Literal["friend", "stranger"]


class Place(BaseModel):
    city: str
    people: list[Person]
    note: str | None = None


def client(mode, key=GOOD):
    if VARIANT == "messages":
        return instructor.from_anthropic(anthropic.Anthropic(api_key=key, base_url=URL), mode=mode)
    return instructor.from_openai(openai.OpenAI(api_key=key, base_url=f"{URL}/v1"), mode=mode)


def made(mode, key=GOOD, name=MODEL, words=PLACE, **more):
    messages = [{"role": "user", "content": words}]
    return client(mode, key).chat.completions.create(
        model=name, messages=messages, response_model=Place, max_retries=0, max_tokens=4000, **more
    )


Mode = instructor.Mode
MODES = {"forced": Mode.ANTHROPIC_TOOLS} if VARIANT == "messages" else {
    "forced": Mode.TOOLS, "strict_tool": Mode.TOOLS_STRICT, "schema": Mode.JSON_SCHEMA, "json_object": Mode.JSON,
}  # fmt: skip
for _name, _mode in MODES.items():
    if _name != "json_object":  # any object will do there: whether it fits is the model's merit

        def _case(mode=_mode):
            return made(mode)

        _case.__name__ = _name
        case(_case)


@case
def stream():
    parts = list(client(MODES["forced"]).chat.completions.create_partial(
        model=MODEL, messages=[{"role": "user", "content": PLACE}], response_model=Place, max_tokens=4000, max_retries=0,
    ))  # fmt: skip
    assert len(parts) > 1 and parts[-1].city is not None
    return len(parts)


@case
def usage():
    messages = [{"role": "user", "content": PLACE}]
    _, answer = client(MODES["forced"]).chat.completions.create_with_completion(
        model=MODEL, messages=messages, response_model=Place, max_tokens=4000, max_retries=0
    )
    return answer.usage


def ask(key, name, streamed):
    if not streamed:
        return made(MODES["forced"], key, name, HI)
    for _ in client(MODES["forced"], key).chat.completions.create_partial(
        model=name, messages=[{"role": "user", "content": RECITE + " x" * 3000}], response_model=Place, max_tokens=4000, max_retries=0
    ):
        pass


refusals(ask)
run()
