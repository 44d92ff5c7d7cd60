"""simonw's llm as a library: "chat" (an extra model of the openai plug-in) and "messages" (llm-anthropic)."""

import llm
from case import (
    BOTH,
    GOOD,
    HI,
    MODEL,
    PIXEL,
    PLACE,
    RECITE,
    URL,
    VARIANT,
    WEATHER,
    case,
    refusals,
    run,
)
from pydantic import BaseModel


class Place(BaseModel):
    city: str
    degrees: int


def model(key=GOOD, name=MODEL):
    if VARIANT == "messages":
        from llm_anthropic import ClaudeMessages

        made = ClaudeMessages(name, supports_images=True, default_max_tokens=4000, use_structured_outputs=True)
        made.claude_model_id, made.base_url, made.key = name, URL, key
        return made
    from llm.default_plugins.openai_models import Chat

    made = Chat(name, key=key, model_name=name, api_base=f"{URL}/v1", supports_tools=True, supports_schema=True, vision=True)
    made.key = key
    return made


def weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER[city]


@case
def plain():
    said = model().prompt(HI, stream=False).text()
    assert "Ann" in said
    return said


@case
def stream():
    parts = list(model().prompt(HI))
    assert "Ann" in "".join(parts)
    return len(parts)


@case
def tools():
    said = model().chain(BOTH, tools=[weather], stream=False).text()
    assert all(words in said for words in WEATHER.values()), said
    return said


@case
def tools_streamed():
    said = "".join(model().chain(BOTH, tools=[weather]))
    assert all(words in said for words in WEATHER.values()), said
    return said


@case
def structured():
    return Place.model_validate_json(model().prompt(PLACE, schema=Place, stream=False).text())


@case
def usage():
    answer = model().prompt(HI, stream=False)
    answer.text()
    used = answer.usage()
    assert used.input > 0 and used.output > 0
    return used


@case
def picture():
    import base64

    return model().prompt(HI, attachments=[llm.Attachment(type="image/png", content=base64.b64decode(PIXEL))], stream=False).text()


def ask(key, name, streamed):
    for _ in model(key, name).prompt(RECITE, stream=streamed):
        pass


refusals(ask)
run()
