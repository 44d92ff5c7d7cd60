"""smolagents: its model, whole and streamed, with tools.

Its own retrying is off: it takes every error whose text has 429 in it for a busy server, and waits a minute each time.
"""

from case import BOTH, GOOD, HI, MODEL, RECITE, URL, WEATHER, case, refusals, run
from smolagents import OpenAIServerModel, Tool
from smolagents.models import ChatMessage, agglomerate_stream_deltas


class Weather(Tool):
    name, description, output_type = "weather", "The weather of a city", "string"
    inputs = {"city": {"type": "string", "description": "which"}}

    def forward(self, city: str) -> str:
        return WEATHER[city]


def model(key=GOOD, name=MODEL):
    return OpenAIServerModel(name, api_base=f"{URL}/v1", api_key=key, retry=False, max_tokens=4000, client_kwargs={"max_retries": 0})


def words(text):
    return [ChatMessage(role="user", content=[{"type": "text", "text": text}])]


@case
def plain():
    answer = model().generate(words(HI))
    assert "Ann" in answer.content and answer.token_usage.output_tokens > 0
    return answer.content


@case
def stream():
    parts = list(model().generate_stream(words(HI)))
    whole = agglomerate_stream_deltas(parts)
    assert "Ann" in whole.content and whole.token_usage.output_tokens > 0
    return whole.content


@case
def tools():
    answer = model().generate(words(BOTH), tools_to_call_from=[Weather()])
    assert [call.function.name for call in answer.tool_calls] == ["weather"] * 2
    return answer.tool_calls


@case
def tools_streamed():
    whole = agglomerate_stream_deltas(list(model().generate_stream(words(BOTH), tools_to_call_from=[Weather()])))
    assert [call.function.name for call in whole.tool_calls] == ["weather"] * 2
    return whole.tool_calls


def ask(key, name, streamed):
    if not streamed:
        return model(key, name).generate(words(RECITE))
    for _ in model(key, name).generate_stream(words(RECITE)):
        pass


refusals(ask)
run()
