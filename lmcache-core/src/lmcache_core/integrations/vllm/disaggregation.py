"""Prefill on one engine, decode on another: what a request's ``kv_transfer_params`` ask of us.

Both engines get the request at once.  The decoder waits for the chunks of its prompt, the prefiller
sends each as soon as it is stored.  What does not come in time the decoder computes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_core.cache import Cache
from lmcache_core.integrations.vllm.geometry import Geometry
from lmcache_core.integrations.vllm.lookups import Tracked
from lmcache_core.logs import EventLog
from lmcache_core.transport.push import Push
from lmcache_core.transport.receive import Expected, Missing
from lmcache_core.transport.transport import Transport

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_ID_CHARS = 128


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says: its part, the transfer's name, and for a prefiller the decoder."""

    prefill: bool
    transfer: str
    decoder: str = ""


def wish_of(request: Request) -> Wish | str | None:
    """Of ``request``; None when it says nothing, a text when what it says is no wish."""
    params = (request.kv_transfer_params or {}).get("lmcache")
    if params is None:
        return None
    if not isinstance(params, dict):
        return "lmcache is not an object"
    role, transfer = params.get("role"), params.get("transfer_id")
    decoder = params.get("decoder", "")
    if role not in ("prefill", "decode"):
        return f"role is {role!r}, not prefill or decode"
    if not isinstance(transfer, str) or not 0 < len(transfer) <= MAX_ID_CHARS:
        return f"transfer_id is not a text of 1 to {MAX_ID_CHARS} characters"
    if role == "prefill" and (not isinstance(decoder, str) or "://" not in decoder):
        return "a prefiller needs decoder, the channel address of the other engine"
    return Wish(role == "prefill", transfer, decoder)


class Disaggregation:
    """Scheduler's thread only.

    Args:
        transport: None when the engine has no channel; then every request is computed here.
        may_prefill, may_decode: by the engine's ``kv_role``.
    """

    def __init__(
        self,
        cache: Cache,
        transport: Transport | None,
        geometry: Geometry,
        *,
        may_prefill: bool,
        may_decode: bool,
    ) -> None:
        self._cache = cache
        self._transport = transport
        self._geometry = geometry
        self._may_prefill = may_prefill
        self._may_decode = may_decode
        self._log = EventLog(cache.now_s)
        self._pushes: dict[str, Push] = {}
        self._expected: dict[str, Expected] = {}

    @property
    def busy(self) -> bool:
        """Whether something is on its way to or from another engine."""
        return self._transport is not None and self._transport.busy

    @property
    def pushing(self) -> bool:
        """Whether some request of this step is another engine's to decode."""
        return bool(self._pushes)

    @property
    def exact_tail(self) -> bool:
        """Whether the prompt's last chunk is moved too, though it is not full.  Not where a chunk
        keeps only the pages that a hit at its end needs: one before it needs others."""
        whole = all(g.stored_blocks == g.chunk_blocks for g in self._geometry.groups)
        return whole and len(self._geometry.kinds) == 1 and not self._geometry.decode_only

    def wish(self, request: Request) -> Wish | None:
        """What ``request`` asks, when this engine can do it."""
        wish = wish_of(request)
        if wish is None:
            return None
        reason = wish if isinstance(wish, str) else self._why_not(wish)
        if reason:
            self._cache.metrics.counter("transfer.not_possible").inc()
            self._log.warn("transfer_not_possible", request_id=request.request_id, reason=reason)
            return None
        return wish if isinstance(wish, Wish) else None

    def start(self, tracked: Tracked, wish: Wish) -> None:
        """Its keys are known: push them, or expect them."""
        assert self._transport is not None
        req_id = tracked.request.request_id
        deadline_s = self._cache.now_s() + self._cache.config.transfer_deadline_s
        if wish.prefill:
            push = self._transport.pusher.start(wish.transfer, wish.decoder, deadline_s=deadline_s)
            if push is not None:
                self._pushes[req_id] = push
            return
        expected = self._transport.receiver.expect(
            wish.transfer, self._missing(tracked), deadline_s=deadline_s
        )
        if expected is not None:
            self._expected[req_id] = expected

    def waits(self, req_id: str) -> bool:
        """Whether its chunks are still coming."""
        expected = self._expected.get(req_id)
        return expected is not None and not expected.done

    def expects(self, req_id: str) -> bool:
        """Whether it is decoded here and was prefilled elsewhere."""
        return req_id in self._expected

    def taken(self, req_id: str) -> None:
        """The request holds what came, or does not need it."""
        expected = self._expected.get(req_id)
        if expected is not None and self._transport is not None:
            self._transport.receiver.release(expected)

    def finished(self, req_id: str) -> dict[str, Any] | None:
        """The request ended or was aborted; what its response says of the transfer."""
        self.taken(req_id)
        expected = self._expected.pop(req_id, None)
        if expected is not None:
            return {"received_bytes": expected.received_bytes, "reason": expected.reason}
        push = self._pushes.pop(req_id, None)
        if push is None or self._transport is None:
            return None
        # Before what is still on its way: how much of the push the prefill has hidden.
        told = {"acknowledged_bytes": push.pushed_bytes}
        self._transport.pusher.computed(push)
        return told

    def reset(self) -> None:
        """What is expected belongs to weights that are no more."""
        for req_id in self._expected:
            self.taken(req_id)

    def _why_not(self, wish: Wish) -> str:
        if self._transport is None:
            return "this engine has no channel (channel: tcp://127.0.0.1:0)"
        if wish.prefill and not self._may_prefill:
            return "this engine's kv_role is kv_consumer"
        if not wish.prefill and not self._may_decode:
            return "this engine's kv_role is kv_producer"
        if not wish.prefill and self._geometry.decode_only:
            return "this attention backend can't go on behind tokens that were loaded"
        return ""

    def _missing(self, tracked: Tracked) -> list[Missing]:
        geometry = self._geometry
        prompt = tracked.request.num_prompt_tokens
        if not self.exact_tail or prompt == 1:
            # What a load may bring: windows are those before its end.
            prompt = (prompt - 1) // geometry.hit_step * geometry.hit_step
        chunks = -(-prompt // geometry.chunk_size)
        keys = tracked.keys[:chunks]
        if tracked.tail is not None and chunks > len(keys):
            keys = [*keys, tracked.tail]
        chunks = len(keys)
        windows = geometry.tail_start(chunks) if len(geometry.kinds) > 1 else len(keys)
        found = []
        for chunk, key in enumerate(keys):
            for number, kind in enumerate(geometry.kinds):
                if number == 0 or chunk >= windows:
                    parent = geometry.key(keys[chunk - 1], number) if chunk else None
                    found.append(Missing(geometry.key(key, number), parent, kind.layout))
        return found
