"""pydantic-ai: "chat", "responses" and "messages"."""

import base64

from case import (
    BOTH,
    GOOD,
    HI,
    MODEL,
    PIXEL,
    PLACE,
    RECITE,
    TOOL,
    URL,
    VARIANT,
    WEATHER,
    case,
    refusals,
    run,
)
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput, ThinkingPart, ToolOutput
from pydantic_ai.settings import ModelSettings


class Place(BaseModel):
    city: str
    degrees: int


def model(key=GOOD, name=MODEL):
    if VARIANT == "messages":
        from anthropic import AsyncAnthropic
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        return AnthropicModel(name, provider=AnthropicProvider(anthropic_client=AsyncAnthropic(api_key=key, base_url=URL)))
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    kind = OpenAIResponsesModel if VARIANT == "responses" else OpenAIChatModel
    return kind(name, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=key))


def weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER[city]


agent = Agent(model(), tools=[weather])


@case
def plain():
    answer = agent.run_sync(HI)
    assert "Ann" in answer.output
    return answer.output


@case
def usage():
    first, again = (Agent(model()).run_sync("The same words again. " * 20) for _ in range(2))
    used = again.usage if not callable(again.usage) else again.usage()
    assert used.input_tokens > 0 and used.output_tokens > 0 and used.cache_read_tokens > 0, used
    return used


@case
def reasoning():
    settings = {"anthropic_thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 4000}
    parts = agent.run_sync(HI, model_settings=settings if VARIANT == "messages" else None).all_messages()[-1].parts
    (thought,) = [part.content for part in parts if isinstance(part, ThinkingPart)]
    assert thought
    return thought


@case
async def stream():
    async with agent.run_stream(HI) as answer:
        texts = [text async for text in answer.stream_text(delta=True, debounce_by=None)]
    assert "Ann" in "".join(texts)
    return len(texts)


@case
def tools():
    return _both(agent.run_sync(BOTH).output)


@case
async def tools_streamed():
    async with agent.run_stream(BOTH) as answer:
        return _both(await answer.get_output())


def _both(said):
    assert all(words in said for words in WEATHER.values()), said
    return said


@case
def history():
    first = agent.run_sync(TOOL)
    second = agent.run_sync(HI, message_history=first.all_messages())
    assert "Ann" in second.output
    return second.output


@case
def forced():
    """Its output tool, the only one, must be called."""
    return Agent(model(), output_type=ToolOutput(Place)).run_sync(PLACE).output


if VARIANT != "messages":  # it knows by their names which of Anthropic's models can do this

    @case
    def structured():
        return Agent(model(), output_type=NativeOutput(Place)).run_sync(PLACE).output


@case
def picture():
    return agent.run_sync([HI, BinaryContent(base64.b64decode(PIXEL), media_type="image/png")]).output


async def ask(key, name, streamed):
    asked = Agent(model(key, name), model_settings=ModelSettings(max_tokens=4000))
    if not streamed:
        return await asked.run(RECITE)
    async with asked.run_stream(RECITE) as answer:
        async for _ in answer.stream_text(delta=True):
            pass


refusals(ask)
run()
