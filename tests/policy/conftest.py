"""The three policies over one real engine: itself, through the token routes, and through chat completions."""

from __future__ import annotations

import pytest
from policies import MODEL, TEMPLATE, Case, engine_of, served

from tidelock.remote import TextPolicy, TokenPolicy
from tidelock.models import TransformerLM, preset, save_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("policies")
    save_checkpoint(directory / "other", TransformerLM(preset("nano-k3", TEMPLATE.tokenizer.vocab_size + 7), seed=9))
    engine = engine_of()
    with served(directory / "service", engine) as box:
        policies = {
            "engine": engine,
            "token ids": TokenPolicy(box["url"], box["key"], MODEL),
            "text": TextPolicy(box["url"] + "/v1", box["key"], MODEL, TEMPLATE),
        }
        yield {name: Case(policy, engine, directory / "other") for name, policy in policies.items()}
    engine.close()


@pytest.fixture(params=["engine", "token ids", "text"])
def case(request, world):
    return world[request.param]


@pytest.fixture(params=["engine", "token ids"])
def exact(request, world):
    return world[request.param]
