"""Every public route, in one table."""

from __future__ import annotations

from starlette.routing import Route

from tidelock.service.endpoint import Endpoint
from tidelock.service.http import Json
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import account, batches, chat, files, messages, models, responses, stored_chat

TRANSLATED = {
    "/v1/chat/completions": chat.Chat,
    "/v1/responses": responses.Responses,
    "/v1/messages": messages.Messages,
    "/anthropic/v1/messages": messages.Messages,
}
PLAIN = [
    ("GET", "/v1/chat/completions", stored_chat.listed),
    ("GET", "/v1/chat/completions/{id}", stored_chat.retrieve),
    ("POST", "/v1/chat/completions/{id}", stored_chat.update),
    ("DELETE", "/v1/chat/completions/{id}", stored_chat.delete),
    ("GET", "/v1/chat/completions/{id}/messages", stored_chat.messages),
    ("POST", "/v1/responses/input_tokens", responses.count),
    ("GET", "/v1/responses/{id}", responses.retrieve),
    ("DELETE", "/v1/responses/{id}", responses.delete),
    ("POST", "/v1/responses/{id}/cancel", responses.cancel),
    ("GET", "/v1/responses/{id}/input_items", responses.input_items),
    ("POST", "/v1/messages/count_tokens", messages.count),
    ("POST", "/anthropic/v1/messages/count_tokens", messages.count),
    ("GET", "/v1/models", models.listed),
    ("GET", "/anthropic/v1/models", models.listed),
    ("GET", "/v1/models/{id:path}", models.one),
    ("GET", "/anthropic/v1/models/{id:path}", models.one),
    ("GET", "/v1/files", files.listed),
    ("POST", "/v1/files", files.create),
    ("GET", "/v1/files/{id}", files.retrieve),
    ("DELETE", "/v1/files/{id}", files.delete),
    ("GET", "/v1/files/{id}/content", files.content),
    ("GET", "/v1/batches", batches.listed),
    ("POST", "/v1/batches", batches.create),
    ("GET", "/v1/batches/{id}", batches.retrieve),
    ("POST", "/v1/batches/{id}/cancel", batches.cancel),
    ("POST", "/v1/tokenizers/estimate-token-count", account.estimate_tokens),
    ("GET", "/v1/users/me/balance", account.balance),
    ("GET", "/v1/usages", account.usages),
    ("GET", "/v1/organization/usage/completions", account.completions_usage),
    ("GET", "/v1/organization/costs", account.costs),
    ("GET", "/v1/organization/spend_limit", account.spend_limit),
    *(("GET", f"/v1/organization/usage/{kind}", account.unused) for kind in account.UNUSED),
]


def routes(state: ServiceState) -> list[Route]:
    """The translated surfaces first: they are what is asked for most."""
    translated = [Route(path, Endpoint(state, surface), methods=["POST"]) for path, surface in TRANSLATED.items()]
    return translated + [Route(path, Json(state, handler), methods=[method]) for method, path, handler in PLAIN]
