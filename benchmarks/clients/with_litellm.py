"""LiteLLM as a client: the provider openai ("chat", "responses"), anthropic ("messages") and moonshot ("kimi")."""

import json

import litellm
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

litellm.suppress_debug_info = True
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER_TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": SCHEMA}}
PROVIDER = {"messages": "anthropic", "kimi": "moonshot"}.get(VARIANT, "openai")
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}

THINKING = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "allowed_openai_params": ["thinking"]}


def completion(messages, key=GOOD, name=MODEL, **more):
    base = URL if VARIANT == "messages" else f"{URL}/v1"
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return litellm.completion(f"{PROVIDER}/{name}", messages, api_key=key, api_base=base, max_tokens=4000, num_retries=0, **more)


if VARIANT == "responses":

    @case
    def plain():
        answer = litellm.responses(model=f"openai/{MODEL}", input=HI, api_key=GOOD, api_base=f"{URL}/v1")
        assert "Ann" in answer.output_text and answer.usage.output_tokens > 0
        return answer.output_text

    @case
    def stream():
        events = list(litellm.responses(model=f"openai/{MODEL}", input=HI, api_key=GOOD, api_base=f"{URL}/v1", stream=True))
        assert events[-1].type == "response.completed"
        return len(events)

else:

    @case
    def plain():
        said = completion(HI).choices[0].message.content
        assert "Ann" in said
        return said

    @case
    def reasoning():
        more = THINKING if VARIANT == "messages" else {}
        thought = completion(HI, **more).choices[0].message.reasoning_content
        assert thought
        return thought

    @case
    def usage():
        for _ in range(2):
            used = completion("The same words again. " * 20).usage
        assert used.prompt_tokens_details.cached_tokens > 0 and used.completion_tokens > 0
        assert used.total_tokens == used.prompt_tokens + used.completion_tokens
        return used

    @case
    def stream():
        more = THINKING if VARIANT == "messages" else {}
        chunks = list(completion(HI, stream=True, stream_options={"include_usage": True}, **more))
        whole = litellm.stream_chunk_builder(chunks)
        assert "Ann" in whole.choices[0].message.content and whole.usage.completion_tokens > 0
        assert any(getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in chunks if chunk.choices)
        return whole.usage

    @case
    def tools():
        return _loop(lambda messages: completion(messages, tools=[WEATHER_TOOL]))

    @case
    def tools_streamed():
        return _loop(lambda messages: litellm.stream_chunk_builder(list(completion(messages, tools=[WEATHER_TOOL], stream=True))))

    @case
    def forced():
        choice = {"type": "function", "function": {"name": "weather"}}
        (call,) = completion("Hm.", tools=[WEATHER_TOOL], tool_choice=choice, parallel_tool_calls=False).choices[0].message.tool_calls
        assert isinstance(json.loads(call.function.arguments)["city"], str)
        return call.function.arguments

    @case
    def structured():
        return json.loads(completion(PLACE, response_format=FORMAT).choices[0].message.content)["city"]

    @case
    def picture():
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
        return completion([{"role": "user", "content": [{"type": "text", "text": HI}, image]}]).choices[0].message.content


def _loop(ask):
    messages = [{"role": "user", "content": BOTH}]
    message = ask(messages).choices[0].message
    assert len(message.tool_calls) == 2, message
    messages.append(message)
    for call in message.tool_calls:
        said = WEATHER[json.loads(call.function.arguments)["city"]]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": said})
    said = ask(messages).choices[0].message.content
    assert all(words in said for words in WEATHER.values()), said
    return said


def ask(key, name, streamed):
    if VARIANT == "responses":
        if streamed:
            name = "gpt-4o"  # of a model that it does not know it makes a stream of its own out of the whole answer
        found = litellm.responses(model=f"openai/{name}", input=RECITE, api_key=key, api_base=f"{URL}/v1", stream=streamed,
                                  num_retries=0)  # fmt: skip
    else:
        found = completion(RECITE, key, name, stream=streamed)
    for event in found if streamed else ():
        if getattr(event, "type", "") == "response.failed":  # the Responses API's failures are handed on as they are
            raise RuntimeError(event.response.error)


refusals(ask)
run()
