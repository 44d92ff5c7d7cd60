"""The OpenAPI 3.1 document of the public API, made from the same structs that decode the requests."""

from __future__ import annotations

import functools
import re
from typing import Any

import msgspec

import tidelock
from tidelock.service import receipts
from tidelock.service.surfaces import anthropic_pages, batches, files, shapes, wallet
from tidelock.service.surfaces.routes import ROUTES, Route

REFERENCE = "#/components/schemas/{name}"
FAILURES = (400, 401, 402, 403, 404, 413, 429, 500, 503, 504, 529)
QUERY = {
    "after": {"type": "string"},
    "before_id": {"type": "string"},
    "after_id": {"type": "string"},
    "limit": {"type": "integer", "minimum": 0, "maximum": 1440},
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "purpose": {"type": "string"},
    "stream": {"type": "boolean"},
    "starting_after": {"type": "integer", "minimum": 0, "maximum": 1 << 53},
    "start_time": {"type": "integer", "minimum": 0, "maximum": 1 << 40},
    "end_time": {"type": "integer", "minimum": 0, "maximum": 1 << 40},
    "bucket_width": {"type": "string", "enum": ["1m", "1h", "1d"]},
    "page": {"type": "string"},
    "since_ms": {"type": "integer", "minimum": 0, "maximum": 1000 << 40},
    "model": {"type": "string"},
    "quantity": {"type": "integer", "minimum": 1, "maximum": wallet.MOST_SEATS},
    "api_key_id": {"type": "string"},
    "project_id": {"type": "string"},
    "outcome": {"type": "string", "enum": list(receipts.OUTCOMES)},
    "group_by": {"type": "array", "items": {"type": "string"}},
}
UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "minLength": 1},
        "purpose": {"type": "string", "enum": list(files.PURPOSES)},
    },
}
BATCH = {
    "endpoint": {"type": "string", "enum": list(batches.ENDPOINTS)},
    "completion_window": {"type": "string", "enum": ["12h", "24h", "7d"]},
}


@functools.cache
def document(model: str, lenient: bool = False) -> dict[str, Any]:
    """`model`: the name that is served, which requests are told to use, unless the server answers to any (`lenient`)."""
    structs = {t for route in ROUTES for t in (route.body, route.result) if isinstance(t, type)}
    structs |= {shapes.Error, shapes.AnthropicError}
    _, components = msgspec.json.schema_components(sorted(structs, key=lambda t: t.__qualname__), ref_template=REFERENCE)
    for component in components.values():
        if "messages" in component.get("properties", {}) or "input" in component.get("properties", {}):
            component["properties"]["model"] = {"type": "string", **({} if lenient else {"enum": [model]})}
    components["BatchRequest"]["properties"] |= BATCH
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tidelock", "version": tidelock.__version__},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    anthropic = "/messages" in route.path and "completions" not in route.path or route.path.startswith("/anthropic")
    error = _json(shapes.AnthropicError if anthropic else shapes.Error)
    if route.result == "bytes":
        content: Any = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    elif route.result == "events":
        content = {"text/event-stream": {"schema": {"type": "string"}}}
    elif route.result == "lines":
        content = {"application/x-jsonl": {"schema": {"type": "string"}}}
    else:
        content = _json(route.result) if route.result else {"application/json": {"schema": {"type": "object"}}}
    if isinstance(route.answers, type) or "stream" in route.query:
        content = {**content, "text/event-stream": {"schema": {"type": "string"}}}
    operation: dict[str, Any] = {
        "operationId": f"{route.method} {route.path}",
        "responses": {
            "200": {"description": "The answer.", "content": content, "links": _links(route)},
            **{str(status): {"description": "An error.", "content": error} for status in FAILURES},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    for name in route.query:
        schema = QUERY[name]
        if name == "limit" and "order" in route.query:
            schema = {**schema, "maximum": files.MOST_LISTED}
        if name == "limit" and "before_id" in route.query:
            schema = {**schema, "minimum": 1, "maximum": anthropic_pages.MOST_LISTED}
        parameters.append({"name": name, "in": "query", "required": name == "start_time" and "bucket_width" in route.query, "schema": schema})
    if parameters:
        operation["parameters"] = parameters
    if route.body == "multipart":
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD}}}
    elif route.body is not None:
        operation["requestBody"] = {"required": True, "content": _json(route.body)}
    return operation


def _links(route: Route) -> dict[str, Any]:
    """What can be done with the id that a creation returns. What is made within something else is named by both ids."""
    made = "key" if "{id}" in route.path else "id"
    if route.method != "POST" or not any(other.path == f"{route.path}/{{{made}}}" for other in ROUTES):
        return {}
    ids = {made: "$response.body#/id", **({"id": "$request.path.id"} if made != "id" else {})}
    begin = f"{route.path}/{{{made}}}"
    followers = [other for other in ROUTES if other.path == begin or other.path.startswith(f"{begin}/")]
    return {
        f"{o.method} {o.path}": {
            "operationId": f"{o.method} {o.path}",
            "parameters": {name: value for name, value in ids.items() if f"{{{name}}}" in o.path},
        }
        for o in followers
    }


def _json(struct: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=struct.__name__)}}}
