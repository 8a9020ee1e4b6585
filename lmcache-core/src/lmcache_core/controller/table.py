"""What can be asked, at which address, by whom."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from lmcache_core.agent import wire
from lmcache_core.controller import messages
from lmcache_core.controller.api import Api
from lmcache_core.controller.config import MAX_WAIT_S
from lmcache_core.controller.metrics import CONTENT_TYPE as METRICS_TYPE
from lmcache_core.controller.operations import SMALL_BYTES, Operation, Query, Run

_SELECT = {"select": {"tokens": [1, 2, 3], "model": "my-model"}}
_PLACES = {
    "source": {"instance": "engine-0", "tier": "disk"},
    "target": {"instance": "engine-1", "tier": "host"},
}
_Limit = Annotated[int, Meta(ge=1, le=1000)]


def _seen() -> tuple[Operation, ...]:
    get = "GET"
    named = Query(name="instance", type=str, default="", text="Only of this instance.")
    return (
        Operation(method=get, path="/healthz", name="alive", text="Whether it runs.",
                  run=Api.alive, answer=dict[str, str], token="none"),
        Operation(method=get, path="/openapi.json", name="openapi", text="This document.",
                  run=Api.openapi, answer=dict[str, Any], token="none"),
        Operation(method=get, path="/metrics", name="metrics",
                  text="Series for Prometheus.", run=Api.metrics, media_type=METRICS_TYPE,
                  token="instance"),
        Operation(method=get, path="/v1/health", name="health",
                  text="How the fleet fares.", run=Api.health, answer=messages.HealthReply),
        Operation(method=get, path="/v1/instances", name="instances",
                  text="Every instance.", run=Api.instances, answer=messages.Instances),
        Operation(method=get, path="/v1/instances/{name}", name="instance",
                  text="One instance.", run=Api.instance, answer=messages.Instance),
        Operation(method="POST", path="/v1/lookup", name="lookup",
                  text="Which instances have how much of a prefix.", run=Api.lookup,
                  body=messages.LookupRequest, answer=messages.LookupReply,
                  problems=(404, 409, 504), example=_SELECT),
        Operation(method=get, path="/v1/usage", name="usage",
                  text="What models and tenants take.", run=Api.usage,
                  answer=messages.UsageReply, problems=(404,), query=(
                      named,
                      Query(name="tier", type=str, default="", text="Only of this tier."),
                  )),
        Operation(method=get, path="/v1/misses/{request_id:path}", name="misses",
                  text="Why chunks of a request missed.", run=Api.misses,
                  answer=messages.Misses, query=(named,), waits=True, problems=(409, 504)),
        Operation(method=get, path="/v1/prefixes", name="prefixes",
                  text="Prefixes that saved most prefill.", run=Api.prefixes,
                  answer=messages.Prefixes, query=(
                      Query(name="limit", type=_Limit, default=20, text="At most so many."),
                  )),
        Operation(method=get, path="/v1/history", name="history",
                  text="Hit rate and throughput over time.", run=Api.history,
                  answer=messages.History),
    )  # fmt: skip


def _jobs_made() -> tuple[Operation, ...]:
    def making(path: str, text: str, run: Run, body: Any, example: Any) -> Operation:
        return Operation(
            method="POST", path=f"/v1/{path}", name=path, text=text, run=run,
            body=body, answer=messages.Job, status=202, makes=True, example=example,
            problems=(404, 409, 429, 504),
        )  # fmt: skip

    recode = {**_SELECT, "tier": "disk"}
    return (
        making("clear", "Delete chunks.", Api.clear, messages.ClearRequest, _SELECT),
        making("move", "Copy chunks, and clear at the source what was confirmed.", Api.move,
               messages.MoveRequest, {**_SELECT, **_PLACES}),
        making("copy", "Copy chunks.", Api.copy, messages.MoveRequest,
               {**_SELECT, **_PLACES}),
        making("compress", "Store chunks encoded.", Api.compress, messages.RecodeRequest,
               {**recode, "codec": "zstd"}),
        making("decompress", "Store chunks as they are.", Api.decompress,
               messages.RecodeRequest, recode),
    )  # fmt: skip


def _kept() -> tuple[Operation, ...]:
    wait = Annotated[float, Meta(ge=0, le=MAX_WAIT_S)]
    states = Literal["", "running", "done", "failed", "cancelled"]
    return (
        Operation(method="GET", path="/v1/pins", name="pins", text="Pins that hold.",
                  run=Api.pins, answer=messages.Pins),
        Operation(method="POST", path="/v1/pins", name="pin",
                  text="Keep a prefix for a time.", run=Api.pin, body=messages.PinRequest,
                  answer=messages.Pin, status=201, makes=True,
                  problems=(404, 409, 429, 504),
                  example={**_SELECT, "owner": "team-a", "ttl_s": 3600}),
        Operation(method="DELETE", path="/v1/pins/{id}", name="unpin", text="End a pin.",
                  run=Api.unpin, answer=messages.Job, status=202, problems=(429,)),
        Operation(method="GET", path="/v1/jobs", name="jobs", text="Jobs, newest first.",
                  run=Api.jobs, answer=messages.Jobs, query=(
                      Query(name="state", type=states, default="", text="Only these."),
                      Query(name="limit", type=_Limit, default=100, text="At most so many."),
                  )),
        Operation(method="GET", path="/v1/jobs/{id}", name="job", text="One job.",
                  run=Api.job, answer=messages.Job, query=(
                      Query(name="wait_s", type=wait, default=0.0,
                            text="Answer when it has ended, or after so long."),
                  )),
        Operation(method="POST", path="/v1/jobs/{id}/cancel", name="cancel",
                  text="Ask a job to end.", run=Api.cancel, answer=messages.Job),
        Operation(method="GET", path="/v1/quotas", name="quotas", text="Limits of tenants.",
                  run=Api.quotas, answer=messages.Quotas),
        Operation(method="PUT", path="/v1/quotas", name="put_quota",
                  text="Set a tenant's limit.", run=Api.put_quota,
                  body=messages.QuotaRequest, answer=messages.Quota,
                  max_body_bytes=SMALL_BYTES, problems=(409,),
                  example={"bytes": 1 << 30, "tenant": "secret-salt", "tier": "disk"}),
        Operation(method="DELETE", path="/v1/quotas/{id}", name="delete_quota",
                  text="End a limit.", run=Api.delete_quota, status=204),
    )  # fmt: skip


def _spoken() -> tuple[Operation, ...]:
    return (
        Operation(method="POST", path=wire.PATH, name="sync", run=Api.sync, waits=True,
                  text="What an instance says, as `lmcache_core.agent.wire.Sync`.",
                  body=wire.Sync, media_type=wire.CONTENT_TYPE, token="instance",
                  max_body_bytes=wire.MAX_BODY_BYTES, problems=(409,)),
        Operation(method="POST", path=wire.WHERE_PATH, name="where", run=Api.where,
                  text="Which peers have chunks, as `lmcache_core.agent.wire.WhereRequest`.",
                  body=wire.WhereRequest, media_type=wire.CONTENT_TYPE, token="instance",
                  max_body_bytes=wire.MAX_BODY_BYTES),
    )  # fmt: skip


OPERATIONS = (*_seen(), *_jobs_made(), *_kept(), *_spoken())
