"""LlamaIndex: "chat" (OpenAILike), "responses" (OpenAIResponses) and "messages" (Anthropic)."""

from case import (
    BOTH,
    GOOD,
    HI,
    MODEL,
    PLACE,
    RECITE,
    URL,
    VARIANT,
    WEATHER,
    case,
    refusals,
    run,
)
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from pydantic import BaseModel


class Place(BaseModel):
    """A place."""

    city: str
    degrees: int


def llm(key=GOOD, name=MODEL):
    if VARIANT == "messages":
        from llama_index.llms.anthropic import Anthropic

        class Ours(Anthropic):
            @property
            def metadata(self):
                return Anthropic(model="claude-sonnet-4-5-20250929", api_key="x").metadata

        return Ours(model=name, api_key=key, base_url=URL, max_tokens=4000, max_retries=0)
    if VARIANT == "responses":
        from llama_index.llms.openai import OpenAIResponses

        class Ours(OpenAIResponses):
            @property  # it knows the models of OpenAI and no others
            def metadata(self):
                return OpenAIResponses(model="gpt-4o", api_key="x").metadata

        return Ours(model=name, api_key=key, api_base=f"{URL}/v1", max_output_tokens=4000, max_retries=0)
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(model=name, api_key=key, api_base=f"{URL}/v1", is_chat_model=True, is_function_calling_model=True,
                      max_tokens=4000, max_retries=0, context_window=100_000)  # fmt: skip


def weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER[city]


def words(text):
    return [ChatMessage(role="user", content=text)]


@case
def plain():
    said = llm().chat(words(HI)).message.content
    assert "Ann" in said
    return said


@case
def stream():
    parts = [part.delta for part in llm().stream_chat(words(HI))]
    assert "Ann" in "".join(part or "" for part in parts)
    return len(parts)


@case
async def tools():
    said = str(await FunctionAgent(tools=[weather], llm=llm(), system_prompt="Be kind.").run(BOTH))
    assert all(text in said for text in WEATHER.values()), said
    return said


@case
def forced():
    return llm().as_structured_llm(Place).chat(words(PLACE)).raw


def ask(key, name, streamed):
    if not streamed:
        return llm(key, name).chat(words(RECITE))
    for _ in llm(key, name).stream_chat(words(RECITE)):
        pass


refusals(ask)
run()
