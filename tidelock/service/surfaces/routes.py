"""Every public route, in one table: who answers, what is sent, what comes back. The OpenAPI document is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.routing import Route as HttpRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from tidelock.service.endpoint import Endpoint, Translation
from tidelock.service.http import Handler, Json
from tidelock.service.state import ServiceState
from tidelock.service.surfaces import (
    account, batches, billing, chat, chat_request, compaction, conversations, files, message_batches, messages,
    messages_request, models, organization, receipts, responses, responses_request, shapes, spend_limit, stored_chat,
    stored_responses, wallet,
)  # fmt: skip

LISTED = ("after", "limit", "order")
CURSORS = ("before_id", "after_id", "limit")
RECEIVED = (*LISTED, "model", "api_key_id", "project_id", "outcome", "start_time", "end_time")
BUCKETED = ("start_time", "end_time", "bucket_width", "limit", "page", "group_by")


@dataclass(frozen=True)
class Route:
    """`answers`: a surface to translate for, or a handler. `result`: the struct of the JSON
    answer, "bytes" or "lines" (of JSON). `body`: the struct of the JSON body, or "multipart"."""

    method: str
    path: str
    answers: type[Translation] | Handler
    result: Any
    body: Any = None
    query: tuple[str, ...] = ()
    once: bool = False  # costs money: an Idempotency-Key counts (a surface's always does)

    def endpoint(self, state: ServiceState) -> ASGIApp:
        return Endpoint(state, self.answers) if isinstance(self.answers, type) else Json(state, self.answers, self.once)


ROUTES = [
    Route("POST", "/v1/chat/completions", chat.Chat, shapes.ChatCompletion, chat_request.ChatRequest),
    Route("POST", "/v1/responses", responses.Responses, shapes.Response, responses_request.ResponsesRequest),
    *(
        route
        for root in ("/v1", "/anthropic/v1")
        for route in (
            Route("POST", f"{root}/messages", messages.Messages, shapes.AnthropicMessage, messages_request.MessagesRequest),
            Route("POST", f"{root}/messages/count_tokens", messages.count, shapes.InputTokens, messages_request.CountRequest),
            Route("GET", f"{root}/messages/batches", message_batches.listed, shapes.AnthropicPage, query=CURSORS),
            Route("POST", f"{root}/messages/batches", message_batches.create, shapes.MessageBatch,
                  message_batches.MessageBatchRequest, once=True),
            Route("GET", f"{root}/messages/batches/{{id}}", message_batches.retrieve, shapes.MessageBatch),
            Route("DELETE", f"{root}/messages/batches/{{id}}", message_batches.delete, shapes.AnthropicDeleted),
            Route("POST", f"{root}/messages/batches/{{id}}/cancel", message_batches.cancel, shapes.MessageBatch),
            Route("GET", f"{root}/messages/batches/{{id}}/results", message_batches.results, "lines"),
        )
    ),
    Route("GET", "/v1/chat/completions", stored_chat.listed, shapes.Listing, query=LISTED),
    Route("GET", "/v1/chat/completions/{id}", stored_chat.retrieve, shapes.ChatCompletion),
    Route("POST", "/v1/chat/completions/{id}", stored_chat.update, shapes.ChatCompletion, stored_chat.Update),
    Route("DELETE", "/v1/chat/completions/{id}", stored_chat.delete, shapes.Deleted),
    Route("GET", "/v1/chat/completions/{id}/messages", stored_chat.messages, shapes.Listing),
    Route("POST", "/v1/responses/input_tokens", stored_responses.count, shapes.InputTokens, responses_request.InputTokensRequest),
    Route("POST", "/v1/responses/compact", compaction.Compact, shapes.Compaction, responses_request.CompactRequest),
    Route("GET", "/v1/responses/{id}", stored_responses.retrieve, shapes.Response, query=("stream", "starting_after")),
    Route("DELETE", "/v1/responses/{id}", stored_responses.delete, shapes.Deleted),
    Route("POST", "/v1/responses/{id}/cancel", stored_responses.cancel, shapes.Response),
    Route("GET", "/v1/responses/{id}/input_items", stored_responses.input_items, shapes.Listing, query=LISTED),
    Route("POST", "/v1/conversations", conversations.create, shapes.Conversation, conversations.Created),
    Route("GET", "/v1/conversations/{id}", conversations.retrieve, shapes.Conversation),
    Route("POST", "/v1/conversations/{id}", conversations.update, shapes.Conversation, conversations.Changed),
    Route("DELETE", "/v1/conversations/{id}", conversations.delete, shapes.Deleted),
    Route("GET", "/v1/conversations/{id}/items", conversations.listed, shapes.Listing, query=LISTED),
    Route("POST", "/v1/conversations/{id}/items", conversations.extend, shapes.Listing, conversations.Items),
    Route("GET", "/v1/conversations/{id}/items/{item}", conversations.item, None),
    Route("DELETE", "/v1/conversations/{id}/items/{item}", conversations.drop, shapes.Conversation),
    Route("GET", "/v1/models", models.listed, shapes.ModelList),
    Route("GET", "/v1/models/{model}", models.one, shapes.Model),
    Route("DELETE", "/v1/models/{model}", models.delete, shapes.Deleted),
    Route("GET", "/anthropic/v1/models", models.listed, None),
    Route("GET", "/anthropic/v1/models/{model}", models.one, None),
    Route("GET", "/v1/files", files.listed, shapes.Listing, query=(*LISTED, "purpose")),
    Route("POST", "/v1/files", files.create, shapes.File, "multipart"),
    Route("GET", "/v1/files/{id}", files.retrieve, shapes.File),
    Route("DELETE", "/v1/files/{id}", files.delete, shapes.Deleted),
    Route("GET", "/v1/files/{id}/content", files.content, "bytes"),
    Route("GET", "/v1/batches", batches.listed, shapes.Listing, query=LISTED),
    Route("POST", "/v1/batches", batches.create, shapes.Batch, batches.BatchRequest, once=True),
    Route("GET", "/v1/batches/{id}", batches.retrieve, shapes.Batch),
    Route("POST", "/v1/batches/{id}/cancel", batches.cancel, shapes.Batch),
    Route("POST", "/v1/tokenizers/estimate-token-count", account.estimate_tokens, shapes.Estimate, chat_request.ChatRequest),
    Route("GET", "/v1/users/me/balance", account.balance, shapes.Balance),
    Route("GET", "/v1/usages", account.usages, shapes.Usages),
    Route("GET", "/v1/organization/usage/completions", account.completions_usage, shapes.Page, query=BUCKETED),
    *(Route("GET", f"/v1/organization/usage/{kind}", account.unused, shapes.Page, query=BUCKETED) for kind in account.UNUSED),
    Route("GET", "/v1/organization/costs", account.costs, shapes.Page, query=BUCKETED),
    Route("GET", "/v1/organization/spend_limit", spend_limit.retrieve, shapes.SpendLimit),
    Route("POST", "/v1/organization/spend_limit", spend_limit.update, shapes.SpendLimit, spend_limit.SpendLimitRequest),
    Route("DELETE", "/v1/organization/spend_limit", spend_limit.delete, shapes.SpendLimitDeleted),
    Route("GET", "/v1/organization", organization.profile, shapes.Organization),
    Route("GET", "/v1/organization/receipts", receipts.listed, shapes.Listing, query=RECEIVED),
    Route("GET", "/v1/organization/receipts/stream", receipts.stream, "events", query=("since_ms",)),
    Route("GET", "/v1/organization/receipts/{id}", receipts.retrieve, shapes.Receipt),
    Route("GET", "/v1/organization/balance", wallet.balance, shapes.Pockets),
    Route("GET", "/v1/organization/payments", wallet.payments, shapes.Listing),
    Route("GET", "/v1/organization/plans", wallet.plans, shapes.Listing),
    Route("GET", "/v1/organization/plans/{id}/preview", wallet.preview, shapes.PlanChange, query=("quantity",)),
    Route("GET", "/v1/organization/projects", organization.projects, shapes.Listing),
    Route("POST", "/v1/organization/projects", organization.create_project, shapes.Project, organization.ProjectRequest),
    Route("GET", "/v1/organization/projects/{id}", organization.project, shapes.Project),
    Route("POST", "/v1/organization/projects/{id}", organization.update_project, shapes.Project, organization.ProjectChange),
    Route("POST", "/v1/organization/projects/{id}/archive", organization.archive_project, shapes.Project),
    Route("GET", "/v1/organization/projects/{id}/api_keys", organization.keys, shapes.Listing),
    Route("POST", "/v1/organization/projects/{id}/api_keys", organization.create_key, shapes.ApiKey, organization.KeyRequest),
    Route("GET", "/v1/organization/projects/{id}/api_keys/{key}", organization.key, shapes.ApiKey),
    Route("DELETE", "/v1/organization/projects/{id}/api_keys/{key}", organization.delete_key, shapes.Deleted),
    Route("GET", "/v1/organization/users", organization.members, shapes.Listing),
    Route("POST", "/v1/organization/users", organization.add_member, shapes.Member, organization.MemberRequest),
    Route("GET", "/v1/organization/users/{id}", organization.member, shapes.Member),
    Route("POST", "/v1/organization/users/{id}", organization.update_member, shapes.Member, organization.RoleRequest),
    Route("DELETE", "/v1/organization/users/{id}", organization.remove_member, shapes.Deleted),
    Route("GET", "/v1/organization/limits", billing.limits, shapes.OrganizationLimits),
    Route("GET", "/v1/organization/subscription", billing.subscription, shapes.Subscription),
    Route("POST", "/v1/organization/subscription", wallet.change, shapes.Subscription, wallet.PlanRequest),
    Route("DELETE", "/v1/organization/subscription", wallet.cancel, shapes.Subscription),
    Route("GET", "/v1/organization/invoices", billing.listed, shapes.Listing),
    Route("GET", "/v1/organization/invoices/{id}", billing.retrieve, shapes.Invoice),
    Route("GET", "/v1/organization/audit_logs", organization.audit_logs, shapes.Listing, query=LISTED),
]


class ByMethod:
    """One path, answered by method."""

    def __init__(self) -> None:
        self.endpoints: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.endpoints.get(scope["method"], self.endpoints.get("GET"))(scope, receive, send)


def routes(state: ServiceState) -> list[HttpRoute]:
    by_path: dict[str, ByMethod] = {}
    for route in ROUTES:
        path = route.path.replace("{model}", "{id:path}")
        by_path.setdefault(path, ByMethod()).endpoints[route.method] = route.endpoint(state)
    return [HttpRoute(path, methods, methods=list(methods.endpoints)) for path, methods in by_path.items()]
