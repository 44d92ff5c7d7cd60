"""The names that OpenTelemetry's conventions give to what we record.

Those of generative AI are still "Development" and have been renamed before; they stand here and nowhere else. What the
conventions have no name for is ours, under `tidelock.`.
"""

from __future__ import annotations

# generative AI (Development, version 1.41 of the conventions)
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
MODEL = "gen_ai.request.model"
INPUT_TOKENS = "gen_ai.usage.input_tokens"  # cached ones included
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS = "gen_ai.usage.cache_creation.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
FINISH_REASONS = "gen_ai.response.finish_reasons"
FIRST_TOKEN = "gen_ai.first_token"  # an event
FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"  # seconds
CHAT = "chat"  # the operation

# of an engine's inside, in seconds: the conventions have no names, these are vLLM's for its own spans
QUEUED = "gen_ai.latency.time_in_queue"
PREFILL = "gen_ai.latency.time_in_model_prefill"
DECODE = "gen_ai.latency.time_in_model_decode"

# HTTP and errors (stable)
METHOD = "http.request.method"
ROUTE = "http.route"
STATUS = "http.response.status_code"
ERROR = "error.type"

# ours
REQUEST_ID = "tidelock.request_id"
ORGANIZATION = "tidelock.organization"
KEY = "tidelock.key_id"
COST = "tidelock.cost_nano_usd"
BILLED_INPUT = "tidelock.billed.input_tokens"
BILLED_OUTPUT = "tidelock.billed.output_tokens"
