"""`upstreams.toml`: the upstreams of a service as a person writes them. Keys of upstreams stay in the environment.

    [pool]                        # all of it may be left out
    choice = "affinity"           # or "least-loaded", "round-robin"
    retries = 2                   # on other upstreams, before the first token only
    max_waiting = 256             # requests in line
    wait_s = 60                   # in line, at most
    spread = 1.5                  # times its share before an upstream's conversations go elsewhere
    probe_s = 5
    model = "tide-nano"           # what clients ask for; it has to be in the price book
    context_length = 262144       # if it is not the release's
    directives = true             # its models can be told in the prompt what an answer is held to; chat: in the parameters

    [[upstream]]
    name = "gpu-1"                # as /health, metrics and usage rows call it
    url = "http://10.0.0.5:8000"  # chat: as OpenAI's clients are given it, such as https://api.example.com/v1
    kind = "tokens"               # Tidelock or vLLM, by token ids; "chat" = any OpenAI-compatible server, by text
    model = "tide-nano"           # as it is called there; may be left out for tokens
    api_key_env = "GPU_1_KEY"     # the environment variable with the key; left out: no key
    max_in_flight = 64
    weight = 1.0
    connect_s = 5                 # what is waited for: a connection, the first event, the next event
    first_token_s = 120
    idle_s = 30
    probe = "/health"             # "" = none; chat: "/models"
    dialect = "openai"            # chat: "kimi" can leave thinking out and go on with a begun answer
                                  # tokens: "tidelock" or "vllm", which differ in more than is written down
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tidelock.remote import Client, Patience, TextPolicy, TokenPolicy
from tidelock.service.upstreams.pool import CHOICES, Options, Pool
from tidelock.service.upstreams.upstream import Upstream
from tidelock.tokens.errors import UserError
from tidelock.tokens.template import Template

KEEP_ALIVE_S = 4.0  # below the 5 s after which uvicorn drops an idle connection, so that none is used as it closes
FIELDS: dict[str, tuple[type, Any]] = {  # of an upstream: type, default (... = there has to be one)
    "name": (str, ...), "url": (str, ...), "kind": (str, ...), "model": (str, ""), "api_key_env": (str, ""),
    "max_in_flight": (int, 64), "weight": (float, 1.0), "connect_s": (float, 5.0), "first_token_s": (float, 120.0),
    "idle_s": (float, 30.0), "probe": (str, None), "dialect": (str, None),
}  # fmt: skip
POOL = {"choice": str, "retries": int, "max_waiting": int, "wait_s": float, "spread": float, "probe_s": float,
        "context_length": int, "model": str, "directives": bool}  # fmt: skip
DIALECTS = {"tokens": ("tidelock", "vllm"), "chat": ("openai", "kimi")}  # the first is the default
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Front:
    """A pool, and what the file says of the model it stands for."""

    pool: Pool
    model: str | None = None
    context_length: int | None = None
    directives: bool = True


def read_upstreams(
    path: str | Path, template: Template, environment: Mapping[str, str] = os.environ, workers: int = 1
) -> Front:
    """Opens no connection. `workers`: how many processes read the same file; each takes its share of `max_in_flight` and
    of `max_waiting`. Raises UserError that names the field."""
    try:
        data = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the upstreams {path}: {error}") from error
    try:
        front = _pool(data, template, environment)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for upstream in front.pool.upstreams:
        upstream.max_in_flight = max(1, upstream.max_in_flight // workers)
    front.pool.line.most //= workers
    return front


def _pool(data: dict[str, Any], template: Template, environment: Mapping[str, str]) -> Front:
    listed = data.get("upstream")
    if not isinstance(listed, list) or not listed or not all(isinstance(u, dict) for u in listed):
        raise UserError("there have to be [[upstream]] tables, one for each upstream")
    if unknown := sorted(set(data) - {"pool", "upstream"}):
        raise UserError(f"unknown table {unknown[0]}")
    said = _typed("[pool]", data.get("pool", {}), POOL)
    options = Options(**{f.name: said[f.name] for f in fields(Options) if f.name in said})
    if options.choice not in CHOICES:
        raise UserError(f"[pool]: choice is one of {', '.join(CHOICES)}, not {options.choice!r}")
    for name in said:
        least = {"retries": 0, "max_waiting": 0, "spread": 1.0, "wait_s": 0.0}.get(name)
        if name not in ("choice", "model", "directives") and (said[name] <= 0 if least is None else said[name] < least):
            raise UserError(f"[pool]: {name} is {said[name]}, which is too small")
    client = Client(KEEP_ALIVE_S)
    upstreams = [_upstream(u, template, environment, client) for u in listed]
    names = [u.name for u in upstreams]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"two upstreams are called {twice[0]}")
    pool = Pool(upstreams, options, template.generation_prompt())
    pool.closers.append(client.close)
    return Front(pool, said.get("model"), said.get("context_length"), said.get("directives", True))


def _upstream(
    data: dict[str, Any], template: Template, environment: Mapping[str, str], client: Client
) -> Upstream:
    where = f"upstream {data.get('name', '?')}"
    said = {name: default for name, (_, default) in FIELDS.items() if default is not ...}
    said |= _typed(where, data, {name: kind for name, (kind, _) in FIELDS.items()})
    for name in ("name", "url", "kind"):
        if not said.get(name):
            raise UserError(f"{where}: {name} is missing")
    if not NAME.fullmatch(said["name"]):
        raise UserError(f"{where}: a name is made of letters, digits, dots, hyphens and underscores")
    if said["kind"] not in ("tokens", "chat"):
        raise UserError(f"{where}: kind is \"tokens\" or \"chat\", not {said['kind']!r}")
    if not said["url"].startswith(("http://", "https://")):
        raise UserError(f"{where}: url begins with http:// or https://")
    if said["kind"] == "chat" and not said["model"]:
        raise UserError(f"{where}: model is missing (what this endpoint calls it)")
    usual, other = DIALECTS[said["kind"]]
    dialect = said["dialect"] or usual
    if dialect not in (usual, other):
        raise UserError(f'{where}: dialect is "{usual}" or "{other}" for kind "{said["kind"]}", not {dialect!r}')
    for name in ("max_in_flight", "weight", "connect_s", "first_token_s", "idle_s"):
        if said[name] <= 0:
            raise UserError(f"{where}: {name} has to be positive")
    key = "none"
    if said["api_key_env"]:
        key = environment.get(said["api_key_env"], "").strip()
        if not key:
            raise UserError(f"{where}: the environment has no {said['api_key_env']}")
    patience = Patience(said["connect_s"], said["first_token_s"], said["idle_s"])
    if said["kind"] == "tokens":
        policy: Any = TokenPolicy(said["url"], key, said["model"] or None, client, patience=patience, await_versions=False,
                                  dialect=dialect, stops=dialect != "vllm")  # fmt: skip
    else:
        policy = TextPolicy(said["url"], key, said["model"], template, None, client, patience=patience, metered=True,
                            dialect=dialect)  # fmt: skip
    probe = said["probe"] if said["probe"] is not None else "/health" if said["kind"] == "tokens" else "/models"
    return Upstream(said["name"], policy, said["kind"], said["max_in_flight"], said["weight"], probe)


def _typed(where: str, data: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise UserError(f"{where} has to be a table")
    out = {}
    for name, value in data.items():
        if name not in kinds:
            raise UserError(f"{where}: unknown field {name}; there are {', '.join(kinds)}")
        kind = kinds[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{where}: {name} is {WORDS[kind]}, not {value!r}")
        out[name] = value
    return out
