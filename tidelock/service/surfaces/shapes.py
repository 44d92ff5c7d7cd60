"""What the public API answers with, as far as the published OpenAPI document promises it. More fields may come."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ErrorBody(msgspec.Struct):
    type: str
    message: str
    code: str | None = None
    param: str | None = None


class Error(msgspec.Struct):
    error: ErrorBody


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class ChatUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    prompt_tokens_details: PromptDetails
    cost_nano_usd: int


class ChatFunction(msgspec.Struct):
    name: str
    arguments: str


class ChatToolCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: ChatFunction


class ChatMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    tool_calls: list[ChatToolCall] = []


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: dict[str, Any] | None


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class ResponsesUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens_details: dict[str, int]


class Response(msgspec.Struct):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress", "queued", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponsesUsage | None
    error: dict[str, Any] | None
    metadata: dict[str, str]
    previous_response_id: str | None


class Conversation(msgspec.Struct):
    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, str]


class Compaction(msgspec.Struct):
    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[dict[str, Any]]
    usage: ResponsesUsage


class AnthropicUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class AnthropicMessage(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class AnthropicErrorBody(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str


class MessageCounts(msgspec.Struct):
    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(msgspec.Struct):
    id: str
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: MessageCounts
    created_at: str
    expires_at: str
    ended_at: str | None
    cancel_initiated_at: str | None
    results_url: str | None


class AnthropicPage(msgspec.Struct):
    data: list[dict[str, Any]]
    has_more: bool
    first_id: str | None
    last_id: str | None


class AnthropicDeleted(msgspec.Struct):
    id: str
    type: str


class InputTokens(msgspec.Struct):
    input_tokens: int


class TotalTokens(msgspec.Struct):
    total_tokens: int


class Estimate(msgspec.Struct):
    data: TotalTokens


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    owned_by: str
    context_length: int


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class File(msgspec.Struct):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]


class Deleted(msgspec.Struct):
    id: str
    object: str
    deleted: bool


class Counts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class Batch(msgspec.Struct):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    created_at: int
    request_counts: Counts


class Listing(msgspec.Struct):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class BalanceData(msgspec.Struct):
    available_balance: float
    voucher_balance: float
    cash_balance: float


class Balance(msgspec.Struct):
    code: int
    scode: str
    status: bool
    data: BalanceData


class Usages(msgspec.Struct):
    usage: dict[str, str]
    limits: list[dict[str, Any]]


class Bucket(msgspec.Struct):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[dict[str, Any]]


class Page(msgspec.Struct):
    object: Literal["page"]
    data: list[Bucket]
    has_more: bool
    next_page: str | None


class SpendLimit(msgspec.Struct):
    object: Literal["organization.spend_limit"]
    threshold_amount: int
    currency: str
    interval: Literal["month"]
    enforcement: dict[str, str]


class Organization(msgspec.Struct):
    object: Literal["organization"]
    id: str
    name: str
    created_at: int
    api_key: dict[str, Any]
    operator: bool


class Receipt(msgspec.Struct):
    object: Literal["organization.receipt"]
    id: str
    created_at: int
    status: Literal["settled", "refused"]
    model: str
    api_key_id: str
    cost_nano_usd: int
    transactions: list[dict[str, Any]]
    sum_nano_usd: int


class Pockets(msgspec.Struct):
    object: Literal["organization.balance"]
    available_nano_usd: int
    cash_nano_usd: int
    voucher_nano_usd: int
    plan_nano_usd: int
    extra_nano_usd: int
    held_nano_usd: int
    owed_nano_usd: int
    lots: list[dict[str, Any]]


class PlanChange(msgspec.Struct):
    object: Literal["organization.subscription.preview"]
    plan: str
    kind: Literal["subscribe", "upgrade", "downgrade", "keep"]
    quantity: int
    charge_nano_usd: int
    unused_nano_usd: int
    effective_at: int
    ends_at: int


class SpendLimitDeleted(msgspec.Struct):
    object: Literal["organization.spend_limit.deleted"]
    deleted: bool


class Project(msgspec.Struct):
    id: str
    object: Literal["organization.project"]
    name: str
    created_at: int
    status: Literal["active", "archived"]


class Member(msgspec.Struct):
    id: str
    object: Literal["organization.user"]
    email: str
    role: Literal["owner", "admin", "developer", "billing", "viewer"]
    added_at: int


class ApiKey(msgspec.Struct):
    id: str
    object: Literal["organization.project.api_key"]
    name: str
    redacted_value: str
    project_id: str
    created_at: int
    scopes: list[str]


class Invoice(msgspec.Struct):
    id: str
    object: Literal["organization.invoice"]
    number: int
    kind: Literal["topup", "credit", "usage"]
    net: str
    tax: str
    total: str
    lines: list[dict[str, Any]]


class OrganizationLimits(msgspec.Struct):
    object: Literal["organization.limits"]
    tier: int | None
    recharged: str
    limits: dict[str, int | None]
    caps: dict[str, dict[str, int | None]]


class Subscription(msgspec.Struct):
    object: Literal["organization.subscription"]
    id: str
    plan: str
    current_period_start: int
    current_period_end: int
    next_plan: str | None
    months: int
    quantity: int
    next_quantity: int | None
