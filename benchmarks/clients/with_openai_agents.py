"""OpenAI's agents, "chat" and "responses": tools, hand-overs, a stored conversation, a session kept by the client."""

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)  # fmt: skip
from case import (
    BOTH,
    GOOD,
    HI,
    MODEL,
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
from openai import AsyncOpenAI
from openai.types.shared import Reasoning
from pydantic import BaseModel

set_tracing_disabled(True)


class Place(BaseModel):
    city: str
    degrees: int


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER[city]


def model(key=GOOD, name=MODEL):
    kind = OpenAIResponsesModel if VARIANT == "responses" else OpenAIChatCompletionsModel
    return kind(name, AsyncOpenAI(api_key=key, base_url=f"{URL}/v1"))


def agent(**more):
    return Agent(**{"name": "a", "instructions": "Be kind.", "model": model(), **more})


def _both(said):
    assert all(words in said for words in WEATHER.values()), said
    return said


@case
def plain():
    answer = Runner.run_sync(agent(), HI)
    assert "Ann" in answer.final_output
    return answer.final_output


@case
def usage():
    for _ in range(2):
        used = Runner.run_sync(agent(), "The same words again. " * 20).context_wrapper.usage
    assert used.input_tokens_details.cached_tokens > 0 and used.output_tokens_details.reasoning_tokens > 0
    assert used.total_tokens == used.input_tokens + used.output_tokens
    return used


@case
async def stream():
    found = Runner.run_streamed(agent(), HI)
    kinds = [event.data.type async for event in found.stream_events() if event.type == "raw_response_event"]
    assert "response.output_text.delta" in kinds and "Ann" in found.final_output
    return len(kinds)


@case
def tools():
    return _both(Runner.run_sync(agent(tools=[weather]), BOTH).final_output)


@case
async def tools_streamed():
    found = Runner.run_streamed(agent(tools=[weather]), BOTH)
    async for _ in found.stream_events():
        pass
    return _both(found.final_output)


@case
def forced():
    return Runner.run_sync(agent(tools=[weather], model_settings=ModelSettings(tool_choice="weather")), TOOL).final_output


@case
def structured():
    return Runner.run_sync(agent(output_type=Place), PLACE).final_output.city


@case
def handed_over():
    other = agent(name="other", handoff_description="for weather tool questions", tools=[weather])
    return Runner.run_sync(agent(handoffs=[other]), "Use a tool to transfer to 'other'.").last_agent.name


@case
async def session():
    kept = SQLiteSession("s", ":memory:")
    settings = ModelSettings(store=False, response_include=["reasoning.encrypted_content"], reasoning=Reasoning(effort="low"))
    asked = agent(tools=[weather], model_settings=settings)
    await Runner.run(asked, BOTH, session=kept)
    said = (await Runner.run(asked, HI, session=kept)).final_output
    assert "Ann" in said and "Rome" in said
    return said


if VARIANT == "responses":

    @case
    async def conversation():
        talk = await AsyncOpenAI(api_key=GOOD, base_url=f"{URL}/v1").conversations.create()
        await Runner.run(agent(tools=[weather]), BOTH, conversation_id=talk.id)
        said = (await Runner.run(agent(tools=[weather]), HI, conversation_id=talk.id)).final_output
        assert "Ann" in said and "Rome" in said
        return said

    @case
    async def server_session():
        from agents import OpenAIConversationsSession

        kept = OpenAIConversationsSession(openai_client=AsyncOpenAI(api_key=GOOD, base_url=f"{URL}/v1"))
        await Runner.run(agent(tools=[weather]), BOTH, session=kept)
        said = (await Runner.run(agent(tools=[weather]), HI, session=kept)).final_output
        assert "Ann" in said and "Rome" in said
        return said

    @case
    def previous_response():
        first = Runner.run_sync(agent(tools=[weather]), TOOL)
        said = Runner.run_sync(agent(), HI, previous_response_id=first.last_response_id).final_output
        assert "Ann" in said
        return said


async def ask(key, name, streamed):
    asked = agent(model=model(key, name), model_settings=ModelSettings(max_tokens=4000))
    if not streamed:
        return await Runner.run(asked, RECITE)
    async for _ in Runner.run_streamed(asked, RECITE).stream_events():
        pass


refusals(ask)
run()
