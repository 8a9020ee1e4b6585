"""The OpenAPI document, and the API reference of the docs, from the table of operations."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import msgspec

from lmcache_core.controller.messages import Problem
from lmcache_core.controller.operations import IDEMPOTENCY_KEY, JSON, Operation
from lmcache_core.controller.table import OPERATIONS

_REF = "#/components/schemas/{name}"


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 of all operations."""
    types = [Problem]
    for operation in OPERATIONS:
        if operation.media_type == JSON:
            types += [t for t in (operation.body, operation.answer) if _is_struct(t)]
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        path = re.sub(r":path}", "}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lmcache-core controller", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def reference_markdown() -> str:
    """The table of docs/controller.md."""
    lines = ["| | | body | answer | |", "|---|---|---|---|---|"]
    for op in OPERATIONS:
        body = op.body.__name__ if op.body is not None else ""
        given = op.answer.__name__ if _is_struct(op.answer) else ""
        query = "".join(f" `{query.name}`" for query in op.query)
        path = re.sub(r":path}", "}", op.path)
        lines.append(
            f"| {op.method} | `{path}`{query} | {body} | {op.status} {given} | {op.text} |"
        )
    return "\n".join(lines) + "\n"


def _operation(op: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": op.name,
        "summary": op.text,
        "security": [] if op.token == "none" else [{"token": []}],
        "responses": _responses(op),
    }
    parameters = _parameters(op)
    if parameters:
        found["parameters"] = parameters
    if op.body is not None:
        content: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
        if op.media_type == JSON:
            content = {"schema": _schema(op.body)}
        if op.example is not None:
            content["example"] = op.example
        found["requestBody"] = {"required": True, "content": {op.media_type: content}}
    return found


def _responses(op: Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"description": HTTPStatus(op.status).phrase}
    if op.status != 204:
        schema = _schema(op.answer) if op.answer is not None else {"type": "string"}
        success["content"] = {op.media_type.partition(";")[0]: {"schema": schema}}
    problem = {JSON: {"schema": {"$ref": _REF.format(name="Problem")}}}
    found: dict[str, Any] = {str(op.status): success}
    for status in op.statuses:
        found[str(status)] = {"description": HTTPStatus(status).phrase, "content": problem}
    return found


def _parameters(op: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", op.path)
    ]
    for query in op.query:
        schema = {**_schema(query.type), "default": query.default}
        found.append(
            {"name": query.name, "in": "query", "description": query.text, "schema": schema}
        )
    if op.makes:
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "The same request with the same key is carried out once.",
                "schema": {"type": "string", "pattern": IDEMPOTENCY_KEY},
            }
        )
    return found


def _schema(kind: Any) -> dict[str, Any]:
    if _is_struct(kind):
        return {"$ref": _REF.format(name=kind.__name__)}
    return msgspec.json.schema(kind)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
