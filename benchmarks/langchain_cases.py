"""LangChain's standard tests of a chat model, over its OpenAI and Anthropic integrations, pointed at $TIDELOCK_URL.

For `benchmarks.public_suites`, which runs it with pytest in a virtual environment that has langchain-tests,
langchain-openai and langchain-anthropic. Thinking is off for Messages: LangChain's streaming test wants an answer of one
block.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

URL = os.environ["TIDELOCK_URL"]
DETAILS = ("cache_read_input", "reasoning_output")
OPENAI = {"model": "tide-nano", "base_url": f"{URL}/v1", "api_key": "sk-test"}


class Standard(ChatModelIntegrationTests):
    supports_json_mode = True

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> Any:
        return self._asked("Why is the sky blue?", stream)

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> Any:
        return self._asked("The same words again and again. " * 20, stream)

    def _asked(self, text: str, stream: bool) -> Any:
        model = self.chat_model_class(**self.chat_model_params)
        if not stream:
            return model.invoke(text)
        first, *others = model.stream(text)
        return sum(others, first)


class TestChat(Standard):
    chat_model_class = ChatOpenAI
    chat_model_params = {**OPENAI, "stream_usage": True}
    supported_usage_metadata_details = {"invoke": DETAILS, "stream": DETAILS}


class TestResponses(TestChat):
    chat_model_params = {**OPENAI, "use_responses_api": True}


class TestMessages(Standard):
    chat_model_class = ChatAnthropic
    chat_model_params = {
        "model": "tide-nano", "base_url": URL, "api_key": "sk-test", "max_tokens": 2000, "thinking": {"type": "disabled"},
    }  # fmt: skip
