"""`InfinistoreConnector`: values in InfiniStore, by helper processes that run its client.

A call borrows a helper, which maps core's regions and moves the bytes.  One that is late is killed,
which takes the buffers back; one that crashes costs its call, never this process.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmcache_backend_infinistore import wire
from lmcache_backend_infinistore.layout import head_name, new_version, payload_name
from lmcache_backend_infinistore.leftovers import Leftovers
from lmcache_backend_infinistore.pool import Pool
from lmcache_backend_infinistore.regions import Regions
from lmcache_backend_infinistore.supervisor import Helper, HelperLost, Settings
from lmcache_backend_infinistore.wire import Code, Entry, Item, Op, Phase
from lmcache_core.sdk import (
    BackendUnavailable,
    BaseConnector,
    Buffer,
    Capabilities,
    ConfigError,
    Durability,
    GetResult,
    Health,
    HostServices,
    OpContext,
    Region,
    Sharing,
    Status,
)

SHORTEST_CALL_S = 0.002
"""With less time left a call is not begun: its end would be the end of a helper."""
TRIES = 2
_NO_VERSION = bytes(12)
_HANGS_UP_S = 0.01
_HEALTH_KEY = b"\0health"


@dataclass(slots=True)
class Work:
    """One key of a call.

    Attributes:
        buffer, view: what to move; None for calls without buffers.
        item: as the helper sees it.
        bounced: it goes over the helper's own memory.
        result: once it is decided; until then it counts as late.
    """

    item: Item
    buffer: Buffer | None = None
    view: memoryview | None = None
    bounced: bool = False
    result: GetResult | None = None


class InfinistoreConnector(BaseConnector):
    """Thread-safe up to ``helpers`` calls.

    Args:
        settings: of the helpers; its host is resolved anew for each.
        host: of core.
        helpers: processes, and calls at the same time.
        start_limit_s: for a helper to be connected.
        restart_max_s: longest delay between starts while they fail.
        longest_deadline_s: longest deadline of any client; what a put replaced is deleted so
            long after, when nobody can be reading it.

    Raises:
        BackendUnavailable: the server can't be reached.
        ConfigError: the client can't work here.
    """

    def __init__(
        self,
        settings: Settings,
        host: HostServices,
        *,
        helpers: int = 2,
        start_limit_s: float = 5.0,
        restart_max_s: float = 1.0,
        longest_deadline_s: float = 10.0,
    ) -> None:
        super().__init__("infinistore", clock=host.clock)
        self._settings = settings
        self._host = host
        self._start_limit_s = start_limit_s
        self._leftovers = Leftovers(
            grace_s=longest_deadline_s, clock=host.clock, counter=host.counter
        )
        self.capabilities = capabilities(helpers=helpers, bounce_bytes=settings.bounce_bytes)
        self._regions = Regions()
        self._pool = Pool(self._start, limit=helpers, restart_max_s=restart_max_s, clock=host.clock)
        try:
            self._pool.adopt(self._start())
        except (HelperLost, OSError) as error:
            raise _not_opened(error) from error
        for region in host.regions():
            self._regions.add(region)
        host.on_region_added(self.register_region)
        host.on_region_removed(self.unregister_region)

    def register_region(self, region: Region) -> None:
        """Let the helpers map ``region``, where it has a descriptor."""
        if not self._closed:
            self._regions.add(region)

    def unregister_region(self, region: Region) -> None:
        """Forget ``region``."""
        self._regions.remove(region)

    def exists(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "exists")
        work = [Work(Item(key)) for key in keys]
        self._run(Op.EXISTS, work, ctx.deadline_s)
        return [_status(each) for each in work]

    def get_into(
        self, keys: Sequence[bytes], targets: Sequence[Buffer], ctx: OpContext
    ) -> list[GetResult]:
        self.check_call(keys, "get_into", targets)
        work = [self._with_buffer(Item(key), each) for key, each in zip(keys, targets)]
        self._run(Op.GET, work, ctx.deadline_s)
        return [each.result or GetResult(Status.TIMED_OUT) for each in work]

    def put_from(
        self, keys: Sequence[bytes], sources: Sequence[Buffer], ctx: OpContext
    ) -> list[Status]:
        self.check_call(keys, "put_from", sources)
        work = [
            self._with_buffer(Item(key, version=new_version()), each)
            for key, each in zip(keys, sources)
        ]
        for each in work:
            if each.item.nbytes > self.capabilities.max_value_bytes:
                each.result = GetResult(Status.REJECTED)
        self._run(Op.PUT, work, ctx.deadline_s)
        return [_status(each) for each in work]

    def delete(self, keys: Sequence[bytes], ctx: OpContext) -> list[Status]:
        self.check_call(keys, "delete")
        work = [Work(Item(key)) for key in keys]
        self._run(Op.DELETE, work, ctx.deadline_s)
        return [_status(each) for each in work]

    def health(self, ctx: OpContext) -> Health:
        self.check_call((), "health")
        work = Work(Item(_HEALTH_KEY))
        self._run(Op.EXISTS, [work], ctx.deadline_s)
        ok = work.result is not None
        return Health(ok=ok, reason="" if ok else "no answer before the deadline")

    def close_resources(self) -> None:
        self._pool.close()
        self._regions.close()

    def _with_buffer(self, item: Item, buffer: Buffer) -> Work:
        view = self.usable_view(buffer)
        if view is None:
            return Work(item, result=GetResult(Status.REJECTED))
        return Work(replace(item, nbytes=buffer.nbytes), buffer, view)

    def _run(self, op: Op, work: Sequence[Work], deadline_s: float) -> None:
        """Decide what is undecided; what stays undecided is late.

        A call that loses its helper is tried once more: a connection that has just died is no
        reason to give up.
        """
        tries = TRIES
        while left := [each for each in work if each.result is None]:
            if deadline_s - self._clock() < SHORTEST_CALL_S:
                return
            try:
                helper = self._pool.take(deadline_s)
            except TimeoutError:
                return
            try:
                if not self._run_group(helper, op, self._place(left), deadline_s):
                    return
            except BackendUnavailable:
                tries -= 1
                if not tries:
                    raise
                for each in left:
                    each.item = replace(each.item, version=new_version())

    def _place(self, work: Sequence[Work]) -> list[Work]:
        """The next of ``work`` whose values find room in a helper's own memory together."""
        group: list[Work] = []
        used = 0
        for each in work:
            if each.buffer is not None:
                place = self._regions.place(each.buffer)
                each.bounced = place is None
                # A target may be larger than any value.
                nbytes = min(each.buffer.nbytes, self.capabilities.max_value_bytes)
                if place is None:
                    if used + nbytes > self._settings.bounce_bytes:
                        break
                    place = (wire.OWN_MAP, wire.BOARD_BYTES + used)
                    used += -(-nbytes // 64) * 64
                each.item = replace(each.item, map_id=place[0], offset=place[1], nbytes=nbytes)
            group.append(each)
        return group

    def _run_group(self, helper: Helper, op: Op, group: list[Work], deadline_s: float) -> bool:
        """Whether it was in time; ``helper`` is given back.

        Raises:
            BackendUnavailable: the helper ended.
        """
        well, gone, reason = False, True, ""
        try:
            self._sweep(helper, deadline_s)
            helper.share(self._regions)
            due = self._leftovers.due()
            if due:
                helper.tell(Op.DROP, due)
            if op is Op.PUT:
                _fill(helper, group)
            entries = helper.ask(op, [each.item for each in group], deadline_s - self._clock())
            self._settle(helper, op, group, entries)
            well = True
        except (TimeoutError, HelperLost, OSError) as error:
            late = isinstance(error, TimeoutError)
            reason = "no answer before the deadline" if late else str(error)
            self._host.counter("helper_kills" if late else "helper_deaths").inc()
            gone = helper.kill()
            self._settle_what_was_done(helper, op, group, gone)
            if not late:
                self._host.logger.warning("helper %d ended: %s", helper.pid, reason)
                raise BackendUnavailable(
                    reason,
                    backend="infinistore",
                    op=op.name.lower(),
                    hint="is the server running, and reachable from here?",
                ) from error
        finally:
            self._pool.give_back(helper, well=well, reason=reason)
        return well

    def _settle(
        self, helper: Helper, op: Op, group: Sequence[Work], entries: Sequence[Entry]
    ) -> None:
        """Take over what the helper has decided; undecided entries are left alone."""
        for each, entry in zip(group, entries):
            if entry.code is Code.NONE:
                continue
            if op is Op.GET and entry.code is Code.OK and each.bounced:
                assert each.view is not None
                at = each.item.offset - wire.BOARD_BYTES
                each.view[: entry.nbytes] = helper.bounce[at : at + entry.nbytes]
            if entry.old != _NO_VERSION:
                self._leftovers.later(payload_name(each.item.key, entry.old))
            each.result = GetResult(Status[entry.code.name], entry.nbytes)

    def _settle_what_was_done(
        self, helper: Helper, op: Op, group: Sequence[Work], gone: bool
    ) -> None:
        """After a kill: what was decided counts, a put that broke off is swept up later.

        A helper that is not gone for certain may still touch the regions: ABANDONED.
        """
        entries = helper.entries(len(group))
        if gone:
            self._settle(helper, op, group, entries)
        for each, entry in zip(group, entries):
            if op is Op.PUT and (entry.code is Code.NONE or not gone):
                self._broken_off(each.item, entry.phase if gone else Phase.HEAD)
        left = [each for each in group if each.buffer is not None and each.result is None]
        held = [each for each in left if not each.bounced and not gone]
        tokens = [each.buffer.token for each in held if each.buffer is not None]
        for each in held:
            each.result = GetResult(Status.ABANDONED)
        if tokens:

            def release() -> None:
                for token in tokens:
                    self._host.released(token)

            helper.when_gone(release)

    def _broken_off(self, item: Item, phase: Phase) -> None:
        if phase is Phase.HEAD:
            self._leftovers.sweep(head_name(item.key))
        if phase is not Phase.BEFORE and item.nbytes:
            self._leftovers.cover(payload_name(item.key, item.version))

    def _sweep(self, helper: Helper, deadline_s: float) -> None:
        """Clear away puts that broke off, before anything is read: see `layout`."""
        limit_s = deadline_s - self._clock()
        with self._leftovers.to_sweep(limit_s) as (covers, sweeps):
            for op, items in ((Op.COVER, covers), (Op.SWEEP, sweeps)):
                if items:
                    helper.ask(op, items, deadline_s - self._clock())

    def _start(self) -> Helper:
        """A new helper; runs off the request path, but at open."""
        limit_s = self._clock() + self._start_limit_s
        address = _reachable(self._settings.host, self._settings.port, self._start_limit_s)
        helper = Helper(replace(self._settings, host=address), limit_s - self._clock())
        self._host.counter("helper_starts").inc()
        try:
            self._sweep(helper, limit_s)
        except BaseException:
            helper.end(kill=True)
            raise
        return helper


def capabilities(*, helpers: int = 2, bounce_bytes: int = 256 << 20) -> Capabilities:
    """What a connector claims."""
    return Capabilities(
        max_concurrency=helpers,
        max_batch=wire.MAX_ITEMS,
        max_value_bytes=bounce_bytes,
        regions=True,
        checksums=True,
        evicts=True,
        durability=Durability.PROCESS,
        sharing=Sharing.CLUSTER,
    )


def _fill(helper: Helper, group: Sequence[Work]) -> None:
    """Copy sources that lie in no region to where the helper sees them."""
    for each in group:
        if each.bounced and each.view is not None:
            at = each.item.offset - wire.BOARD_BYTES
            helper.bounce[at : at + each.item.nbytes] = each.view


def _status(work: Work) -> Status:
    return work.result.status if work.result else Status.TIMED_OUT


def _reachable(host: str, port: int, limit_s: float) -> str:
    """The server's IPv4 address, which is all that the library takes.

    Raises:
        OSError: nobody is there, or a relay that hangs up at once; much cheaper to learn so
            than by a helper.
    """
    found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    address = str(found[0][4][0])
    with socket.create_connection((address, port), timeout=limit_s) as sock:
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        if poller.poll(_HANGS_UP_S * 1000):
            raise ConnectionResetError("the server hangs up at once")
    return address


def _not_opened(error: Exception) -> Exception:
    if isinstance(error, HelperLost) and error.setup:
        hint = "apt-get install libibverbs1" if "libibverbs" in str(error) else "see the README"
        return ConfigError(str(error), backend="infinistore", op="open", hint=hint)
    return BackendUnavailable(
        str(error) or "the helper was not ready in time",
        backend="infinistore",
        op="open",
        hint="is the server running, and reachable from here?",
    )
