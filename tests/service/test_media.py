"""A model that reads text: pictures are held to their own rules, refused by name, or told to it in words."""

from __future__ import annotations

import base64

import anthropic
import httpx2 as httpx
import openai
import pytest

DOT = base64.b64encode(b"\x89PNG dot").decode()
URL = f"data:image/png;base64,{DOT}"
UNSEEN = "[an image, which this model cannot see]"
WRONG = {
    "no URL": "picture.png", "no base64": "data:image/png;base64,!!", "empty": "data:image/png;base64,",
    "no picture": "data:text/html;base64,aGk=",
}  # fmt: skip


def bodies(url: str) -> dict[str, tuple[str, dict, str]]:
    """By surface: (path, body, where the picture is)."""
    kind, _, data = url.partition(";base64,")
    source = {"type": "url", "url": url}
    if ";" in url:
        source = {"type": "base64", "media_type": kind.removeprefix("data:"), "data": data}
    image = {"type": "image", "source": source}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "t"}, image]}
    call = {"type": "tool_use", "id": "a", "name": "look", "input": {}}
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": url}}]
    chat = {"model": "tide", "messages": [{"role": "user", "content": parts}]}
    items = [{"role": "user", "content": [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": url}]}]
    user = {"role": "user", "content": [{"type": "text", "text": "see"}, image]}
    loop = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    messages = {"model": "tide", "max_tokens": 50}
    return {
        "chat": ("/chat/completions", chat, "messages[0].content[1]"),
        "responses": ("/responses", {"model": "tide", "input": items}, "input[0].content[1]"),
        "messages": ("/messages", {**messages, "messages": [user]}, "messages[0].content[1]"),
        "result": ("/messages", {**messages, "messages": loop}, "messages[2].content[0].content[1]"),
    }


@pytest.fixture
def ask(service):
    secret = service.key()

    def post(path: str, body: dict) -> httpx.Response:
        return httpx.post(service.running.base_url + path, json=body, headers={"authorization": f"Bearer {secret}"})

    return post


@pytest.mark.parametrize("surface", list(bodies(URL)))
def test_strict_servers_refuse_the_part_by_name_and_charge_nothing(service, ask, surface):
    path, body, where = bodies(URL)[surface]
    refused = ask(path, body)
    assert refused.status_code == 400 and where in refused.json()["error"]["message"]
    assert "image" in refused.json()["error"]["message"] and not service.policy.prompts
    assert service.state.ledger.balance("ann") == 10**9


@pytest.mark.parametrize("surface", list(bodies(URL)))
def test_lenient_servers_tell_the_model_what_it_cannot_see(service, ask, surface):
    service.state.lenient = True
    path, body, _ = bodies(URL)[surface]
    assert ask(path, body).status_code == 200
    assert UNSEEN.encode() in b"".join(map(service.policy.template.tokenizer.token_bytes, service.policy.prompts[0]))


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("surface", list(bodies(URL)))
def test_what_is_no_picture_is_refused_by_everybody(service, ask, surface, fault):
    service.state.lenient = True
    path, body, _ = bodies(WRONG[fault])[surface]
    assert ask(path, body).status_code == 400


def test_the_models_list_says_so(service, ask):
    listed = service.client().models.list().data[0]
    assert listed.supports_image_in is False and listed.supports_video_in is False


def test_a_stored_response_lists_the_picture_it_was_asked_with(service):
    service.state.lenient = True
    client = service.client()
    answer = client.responses.create(**bodies(URL)["responses"][1])
    parts = client.responses.input_items.list(answer.id).data[0].content
    assert [part.type for part in parts] == ["input_text", "input_image"] and parts[1].image_url == URL


def test_a_compacted_conversation_goes_on_from_one_item(service):
    client, tokenizer = service.client(), service.policy.template.tokenizer
    compacted = client.responses.compact(model="tide", input=[
        {"role": "user", "content": "my name is Ann"}, {"role": "assistant", "content": "noted"},
        {"role": "user", "content": "and I like tea"},
    ])  # fmt: skip
    assert compacted.object == "response.compaction" and [item.type for item in compacted.output] == ["compaction"]
    assert compacted.usage.output_tokens == len(service.policy.sampled[-1])
    charged = 10**9 - service.state.ledger.balance("ann")
    assert charged == compacted.usage.cost_nano_usd > 0
    items = [item.model_dump(exclude_none=True) for item in compacted.output]
    client.responses.create(model="tide", input=[*items, {"role": "user", "content": "what do I like?"}])
    prompt = b"".join(map(tokenizer.token_bytes, service.policy.prompts[-1])).decode(errors="replace")
    assert all(words in prompt for words in ("my name is Ann", "and I like tea", "in short:\nhello", "what do I like?"))
    assert "noted" not in prompt
    with pytest.raises(openai.BadRequestError, match="encrypted_content was not made here"):
        client.responses.create(model="tide", input=[{**items[0], "encrypted_content": "aGk="}])


def test_more_tokens_than_there_is_room_for_are_the_room_in_the_lenient_profile(service):
    client = service.client()
    ask = {"model": "tide", "messages": [{"role": "user", "content": "x"}], "max_tokens": service.state.context_length}
    with pytest.raises(openai.BadRequestError, match="exceed the context"):
        client.chat.completions.create(**ask)
    service.state.lenient = True
    client.chat.completions.create(**ask)
    assert service.policy.params[-1].max_tokens == 4096 - len(service.policy.prompts[-1])
    claude = anthropic.Anthropic(base_url=service.running.base_url.removesuffix("/v1"), api_key=service.key())
    assert claude.messages.create(**ask).stop_reason == "end_turn"


def test_a_file_in_a_chat_is_a_part_like_the_others(service, ask):
    part = {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"}}
    body = {"model": "tide", "messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, part]}]}
    refused = ask("/chat/completions", body)
    assert refused.status_code == 400 and "file in messages[0].content[1]" in refused.json()["error"]["message"]
    service.state.lenient = True
    assert ask("/chat/completions", body).status_code == 200
    part["file"] = {"file_data": "data:image/png;base64,AAAA"}
    assert ask("/chat/completions", body).status_code == 400
