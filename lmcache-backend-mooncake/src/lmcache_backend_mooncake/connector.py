"""`MooncakeConnector`: values in Mooncake Store, by a client in a helper process.

Buffers inside a region that core registered are read and written in place; the store and this
process never hold a copy between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_backend_mooncake.codes import AWAY, Code, deleted, name_of, status_of
from lmcache_backend_mooncake.lending import Lending
from lmcache_backend_mooncake.link import Late
from lmcache_backend_mooncake.settings import Settings
from lmcache_backend_mooncake.supervisor import Supervisor
from lmcache_core.sdk import (
    CLOSE_LIMIT_S,
    BackendClosed,
    BackendUnavailable,
    BaseConnector,
    Buffer,
    Capabilities,
    Durability,
    GetResult,
    Health,
    HostServices,
    MemoryKind,
    OnExisting,
    OpContext,
    Region,
    Sharing,
    Status,
    status_of_oserror,
)

_PREFIX = "lmc-"
_UNKNOWN = -1
"""As a code: says nothing about the value."""


class MooncakeConnector(BaseConnector):
    """Thread-safe up to ``max_concurrency`` calls.

    Args:
        settings: of `settings.read_settings`.
        host: core's services.
        end_s: when it must have opened, on the clock of ``host``.

    Raises:
        ConfigError: the library can't be loaded.
        BackendUnavailable: the store can't be opened by ``end_s``.
    """

    def __init__(self, settings: Settings, host: HostServices, end_s: float) -> None:
        super().__init__("mooncake", clock=host.clock)
        self._host = host
        self._supervisor = Supervisor(settings, host)
        self.capabilities = capabilities(settings)
        for region in host.regions():
            self._supervisor.add(region)
        try:
            self._supervisor.link(end_s)
        except TimeoutError as error:
            self._supervisor.close(0.0)
            raise BackendUnavailable(
                "the store was not opened in time", backend="mooncake", op="open",
                hint="is mooncake_master running there, and does it answer?",
            ) from error  # fmt: skip
        host.on_region_added(self.register_region)
        host.on_region_removed(self.unregister_region)

    def register_region(self, region: Region) -> None:
        """Map ``region`` into the helper: its buffers move without a copy from then on."""
        if not self._closed and os.getpid() == self._pid:
            self._supervisor.add(region)

    def unregister_region(self, region: Region) -> None:
        """Forget ``region``."""
        if not self._closed and os.getpid() == self._pid:
            self._supervisor.remove(region)

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "exists")
        codes = self._plain("exists", keys, ctx)
        if codes is None:
            return [Status.TIMED_OUT] * len(keys)
        return [Status.MISS if code == 0 else status_of(code) for code in codes]

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)

        def fill(lending: Lending, answer: dict[str, Any]) -> list[GetResult]:
            sizes = {int(i): max(0, size) for i, size in answer["sizes"].items()}
            found = []
            for index, code in enumerate(answer["codes"]):
                if code >= 0:
                    lending.copy_out(index, code)
                    found.append(GetResult(Status.OK, code))
                elif code == Code.INVALID_PARAMS:
                    found.append(GetResult(Status.SIZE_MISMATCH, sizes.get(index, 0)))
                else:
                    found.append(GetResult(status_of(code)))
            return found

        return self._move("get", keys, targets, ctx, fill, GetResult)

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self.check_call(keys, "put_from", sources)

        def judge(_: Lending, answer: dict[str, Any]) -> list[Status]:
            busy = answer["codes"].count(Code.OBJECT_ALREADY_EXISTS)
            if busy:
                self._host.counter("mooncake.puts_of_unended_keys").inc(busy)
            return [status_of(code) for code in answer["codes"]]

        return self._move("put", keys, sources, ctx, judge, lambda status: status)

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "delete")
        codes = self._plain("delete", keys, ctx)
        if codes is None:
            return [Status.TIMED_OUT] * len(keys)
        return [deleted(code) for code in codes]

    def health(self, ctx: OpContext) -> Health:
        """One round trip to the master."""
        self.check_call((), "health")
        try:
            codes = self._plain("health", None, ctx)
        except BackendUnavailable as error:
            return Health(ok=False, reason=error.message)
        if codes is None:
            return Health(ok=False, reason="no answer before the deadline")
        return Health(ok=codes[0] >= 0, reason=name_of(codes[0]) if codes[0] < 0 else "")

    def close_resources(self) -> None:
        self._supervisor.close(CLOSE_LIMIT_S - 1.0)

    def _plain(self, op: str, keys: Sequence[bytes] | None, ctx: OpContext) -> list[int] | None:
        """Codes of an operation without buffers; None past the deadline."""
        if keys is not None and not keys:
            return []
        if ctx.deadline_s <= self._clock():
            return None
        named = {} if keys is None else {"keys": [name_of_key(key) for key in keys]}
        try:
            link = self._supervisor.link(ctx.deadline_s)
            codes: list[int] = link.ask({"op": op, **named}, ctx.deadline_s)["codes"]
        except (Late, TimeoutError):
            self._host.counter("mooncake.late_calls").inc()
            return None
        except OSError as error:
            self._host.counter("mooncake.failed_calls").inc()
            self._host.logger.warning("%s: %r", op, error)
            return [_UNKNOWN] * max(1, len(keys or ()))
        except BackendUnavailable as error:
            raise self._unavailable(error, op) from error
        self._expect_master(codes, op)
        return codes

    def _move(
        self,
        op: str,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        ctx: OpContext,
        judge: Callable[[Lending, dict[str, Any]], list[Any]],
        wrap: Callable[[Status], Any],
    ) -> list[Any]:
        """An operation with buffers: one answer a key, in order."""
        most = self.capabilities.max_value_bytes if op == "put" else 1 << 62
        taken = [
            i for i, buffer in enumerate(buffers)
            if self.usable_view(buffer) is not None and buffer.nbytes <= most
        ]  # fmt: skip
        answers = [wrap(Status.REJECTED)] * len(keys)
        if not taken:
            return answers
        late = ctx.deadline_s <= self._clock()
        found: list[Any] = [wrap(Status.TIMED_OUT)] * len(taken)
        if not late:
            lent = [buffers[i] for i in taken]
            found = self._lend(op, [keys[i] for i in taken], lent, ctx, judge, wrap)
        for i, answer in zip(taken, found):
            answers[i] = answer
        return answers

    def _lend(
        self,
        op: str,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        ctx: OpContext,
        judge: Callable[[Lending, dict[str, Any]], list[Any]],
        wrap: Callable[[Status], Any],
    ) -> list[Any]:
        lending: Lending | None = None
        try:
            link = self._supervisor.link(ctx.deadline_s)
            lending = Lending(buffers, self._supervisor.mapped)
            if op == "put":
                lending.copy_in()
            tokens = [b.token for b, inside in zip(buffers, lending.inside) if inside]
            request = {
                "op": op,
                "keys": [name_of_key(key) for key in keys],
                "at": lending.places,
                "attached": lending.attached_bytes,
            }

            def ended() -> None:
                for token in tokens:
                    self._host.released(token)

            answer = link.ask(request, ctx.deadline_s, ended, lending.fds)
            self._expect_master(answer["codes"], op)
            return judge(lending, answer)
        except Late:
            assert lending is not None
            self._host.counter("mooncake.late_calls").inc()
            self._host.counter("mooncake.abandoned").inc(sum(lending.inside))
            # What was copied is no concern of the library's.
            by_place = {True: Status.ABANDONED, False: Status.TIMED_OUT}
            return [wrap(by_place[inside]) for inside in lending.inside]
        except TimeoutError:
            return [wrap(Status.TIMED_OUT)] * len(keys)
        except OSError as error:
            self._host.counter("mooncake.failed_calls").inc()
            self._host.logger.warning("%s: %r", op, error)
            return [wrap(status_of_oserror(error))] * len(keys)
        except BackendUnavailable as error:
            raise self._unavailable(error, op) from error
        finally:
            if lending is not None:
                lending.close()

    def _unavailable(self, error: BackendUnavailable, op: str) -> Exception:
        if self._closed:
            return BackendClosed(
                "the connector was closed", backend="mooncake", op=op, hint="open it again"
            )
        return BackendUnavailable(error.message, backend="mooncake", op=op, hint=error.hint)

    def _expect_master(self, codes: Sequence[int], op: str) -> None:
        away = AWAY.intersection(codes)
        if away:
            raise BackendUnavailable(
                f"the master does not answer: {name_of(min(away))}",
                backend="mooncake",
                op=op,
                hint="is mooncake_master running, and can it be reached?",
            )


def capabilities(settings: Settings) -> Capabilities:
    """What a connector with these settings claims."""
    return Capabilities(
        max_concurrency=settings.max_concurrency,
        max_batch=64,
        memory=frozenset({MemoryKind.HOST, MemoryKind.PINNED}),
        on_existing=OnExisting.KEEP,
        regions=True,
        # From the watermark on, and with whoever lends the memory.
        evicts=True,
        # Memory that we lend ends with us.
        durability=Durability.NONE if settings.segment_bytes else Durability.PROCESS,
        sharing=Sharing.CLUSTER,
    )


def name_of_key(key: bytes) -> str:
    """How a key is called in the store."""
    return f"{_PREFIX}{key.hex()}"
