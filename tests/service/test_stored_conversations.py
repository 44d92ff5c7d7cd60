"""Conversations as the official `openai` client sees them: items in order, told to the model, added to by responses."""

from __future__ import annotations

import openai
import pytest

from tidelock.tokens.message import Message


def said(service) -> str:
    return service.state.template.tokenizer.decode(service.policy.prompts[-1])


def test_a_response_is_told_the_conversation_and_adds_to_it(service):
    service.policy.turns = [Message("assistant", "I will.", reasoning="a code"), Message("assistant", "It is 777.")]
    api = service.client()
    talk = api.conversations.create(items=[{"role": "user", "content": "The code is 777."}], metadata={"a": "b"})
    assert (talk.object, talk.metadata) == ("conversation", {"a": "b"})
    first = api.responses.create(model="tide", input="Remember it.", conversation=talk.id)
    assert first.conversation.id == talk.id and "The code is 777." in said(service)
    for event in api.responses.create(model="tide", input="What is it?", conversation={"id": talk.id}, store=False, stream=True):
        pass
    assert event.response.output_text == "It is 777." and "I will." in said(service) and "Remember it." in said(service)
    kinds = [(item.type, getattr(item, "role", None)) for item in api.conversations.items.list(talk.id, order="asc")]
    user, assistant = ("message", "user"), ("message", "assistant")
    assert kinds == [user, user, ("reasoning", None), assistant, user, assistant]


def test_a_failed_response_adds_nothing(service):
    service.policy.fail_after = 0
    api = service.client(max_retries=0)
    talk = api.conversations.create()
    with pytest.raises(openai.InternalServerError):
        api.responses.create(model="tide", input="hi", conversation=talk.id)
    assert list(api.conversations.items.list(talk.id)) == []


def test_items_are_listed_in_pages_read_and_dropped_one_by_one(service):
    api = service.client()
    talk = api.conversations.create(items=[{"role": "user", "content": str(n)} for n in range(5)])
    added = api.conversations.items.create(talk.id, items=[{"role": "user", "content": "5"}])
    assert [item.content[0].text for item in added.data] == ["5"]
    assert [item.content[0].text for item in api.conversations.items.list(talk.id, limit=2)] == list("543210")
    page = api.conversations.items.list(talk.id, limit=2, order="asc")
    assert page.has_more and [item.content[0].text for item in page.data] == ["0", "1"]
    item = page.data[1]
    assert api.conversations.items.retrieve(item.id, conversation_id=talk.id).content[0].text == "1"
    api.conversations.items.delete(item.id, conversation_id=talk.id)
    assert [item.content[0].text for item in api.conversations.items.list(talk.id, order="asc")] == list("02345")
    assert api.conversations.update(talk.id, metadata={"topic": "t"}).metadata == {"topic": "t"}
    assert api.conversations.delete(talk.id).deleted
    for gone in (lambda: api.conversations.retrieve(talk.id), lambda: api.responses.create(model="tide", input="x", conversation=talk.id)):
        with pytest.raises(openai.NotFoundError):
            gone()


def test_what_no_response_could_be_told_is_refused_when_it_is_added(service):
    api = service.client()
    talk = api.conversations.create()
    with pytest.raises(openai.BadRequestError):
        api.conversations.items.create(talk.id, items=[{"type": "web_search_call", "id": "x"}])
    with pytest.raises(openai.BadRequestError):
        api.responses.create(model="tide", input="hi", conversation=talk.id, previous_response_id="resp_1")
