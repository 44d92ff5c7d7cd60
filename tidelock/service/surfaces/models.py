"""What can be asked for: the models list in OpenAI's shape with Kimi's extra fields, or Anthropic's to who speaks it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from tidelock.service import errors
from tidelock.service.auth import authenticate
from tidelock.service.http import is_lenient, speaks_anthropic
from tidelock.service.state import ServiceState

EFFORTS = ["low", "high", "max"]


async def listed(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/models`"""
    seen = authenticate(state, request).sees(state.model)
    if speaks_anthropic(request):
        first = state.model if seen else None
        return {"data": [_anthropic(state)] if seen else [], "has_more": False, "first_id": first, "last_id": first}
    return {"object": "list", "data": [_openai(state)] if seen else []}


async def one(state: ServiceState, request: Request) -> dict[str, Any]:
    """`GET /v1/models/{id}`"""
    key = authenticate(state, request)
    name = request.path_params["id"]
    if not key.sees(state.model) or (name != state.model and not is_lenient(state, request)):
        raise errors.not_found(f"no model {name!r} here", "model", "model_not_found")
    return {**(_anthropic(state) if speaks_anthropic(request) else _openai(state)), "id": name}


async def delete(state: ServiceState, request: Request) -> dict[str, Any]:
    """`DELETE /v1/models/{id}`: customers own no models here, so there is none that they could delete."""
    key = authenticate(state, request)
    name = request.path_params["id"]
    if name != state.model or not key.sees(state.model):
        raise errors.not_found(f"no model {name!r} here", "model", "model_not_found")
    raise errors.permission_denied("this model is the service's own; a key cannot delete it")


def _openai(state: ServiceState) -> dict[str, Any]:
    return {
        "id": state.model,
        "object": "model",
        "created": 0,
        "owned_by": "tidelock",
        "display_name": state.model,
        "context_length": state.context_length,
        "supports_image_in": False,
        "supports_video_in": False,
        "supports_reasoning": True,
        "supports_tool_use": True,
        "supports_thinking_type": "both",
        "think_efforts": {"support": True, "valid_efforts": EFFORTS, "default_effort": "max"},
    }


def _anthropic(state: ServiceState) -> dict[str, Any]:
    yes, no = {"supported": True}, {"supported": False}
    return {
        "id": state.model,
        "type": "model",
        "display_name": state.model,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": state.context_length,
        "max_tokens": state.context_length,
        "capabilities": {
            "batch": no, "citations": no, "code_execution": no, "image_input": no, "pdf_input": no,
            "context_management": no, "server_tools": {**no, "code_execution": no, "web_search": no},
            "effort": {**yes, "low": yes, "medium": yes, "high": yes, "max": yes}, "structured_outputs": yes,
            "thinking": {**yes, "types": {"enabled": yes, "disabled": yes, "adaptive": yes, "between_tools": yes}},
        },
    }  # fmt: skip
