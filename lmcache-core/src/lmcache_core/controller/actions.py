"""What operators ask for, as steps of jobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lmcache_core.agent import wire
from lmcache_core.controller import messages
from lmcache_core.controller.documents import Documents
from lmcache_core.controller.jobs import SLICE_PIN, Step
from lmcache_core.controller.names import Names
from lmcache_core.controller.problem import Refusal
from lmcache_core.controller.records import LeaseRecord
from lmcache_core.controller.registry import Record, Registry
from lmcache_core.controller.selection import Chosen, by_model
from lmcache_core.keys import DIGEST_BYTES, TAG_BYTES

SLICE_KEYS = 4096
HOST_SHARE = 8
"""A slice between instances takes at most such a part of the smaller host tier."""
_SUFFIX = slice(TAG_BYTES + DIGEST_BYTES, None)
_NEW = "new"
"""An order's id until it has its own."""


class Actions:
    """Turns requests into steps; makes nothing.  Belongs to one event loop."""

    def __init__(self, documents: Documents, registry: Registry, names: Names) -> None:
        self._documents = documents
        self._registry = registry
        self._names = names

    def clear(
        self, chosen: Chosen, *, instances: Sequence[str], tiers: Sequence[str]
    ) -> list[Step]:
        """One part an instance; also of those that are lost, as they may come back.

        Raises:
            Refusal: an instance or a tier is unknown.
        """
        keys = None if chosen.keys is None else wire.join(chosen.keys)
        tags = None
        if chosen.keys is None and chosen.tags is not None:
            tags = tuple(sorted(chosen.tags))
        order = wire.Clear(id=_NEW, tiers=tuple(tiers), tags=tags, keys=keys)
        holders = self._holders(instances)
        if tiers:
            holders = self._with_tiers(holders, tiers, instances)
        return [Step(instance=name, order=order) for name in holders]

    def pin(
        self, chosen: Chosen, *, pin: str, tier: str, until_s: float, instances: Sequence[str]
    ) -> tuple[wire.Pin, list[str], int]:
        """The order, its instances, and the bytes that one of them pins.

        Raises:
            Refusal: no prefix, an unknown place, or nobody has some of it.
        """
        if not chosen.keys:
            raise Refusal(
                422,
                "nothing_to_pin",
                "a pin is of tokens, text or keys, of at least one chunk",
                hint="a prefix shorter than the model's chunk size has none",
            )
        groups = by_model(chosen, self._names)
        if len(groups) > 1:
            raise Refusal(422, "several_models", "a pin is of one model's chunks")
        model = groups[0][0]
        if instances:
            records = [self._holder(name) for name in dict.fromkeys(instances)]
        else:
            runs = self._registry.directory.prefix(chosen.prefix)
            found = [self._registry.at(run.slot) for run in runs]
            records = [r for r in found if r is not None and self._registry.is_live(r)]
        if not records:
            raise Refusal(
                409,
                "nobody_has_it",
                "no instance has any of this prefix",
                hint="name the instances that are to pin what they get of it",
            )
        for record in records:
            _tier(record, tier)
        sizes = {kind.suffix: kind.layout.payload_bytes for kind in model.kinds}
        nbytes = sum(sizes.get(key[_SUFFIX], 0) for key in chosen.keys)
        order = wire.Pin(
            id=_NEW,
            pin=pin,
            tier=tier,
            keys=wire.join(chosen.keys),
            until_s=until_s,
            kinds=model.kinds,
        )
        return order, sorted(record.name for record in records), nbytes

    async def copy(
        self, chosen: Chosen, source: messages.Place, target: messages.Place, *, move: bool
    ) -> list[Step]:
        """Slices of at most `SLICE_KEYS`, one after the other; between instances also of no more
        than a host tier can hold beside its work.

        Raises:
            Refusal: an unknown place, one that can't be read or written, or an unknown model.
        """
        giver, taker = self._holder(source.instance), self._holder(target.instance)
        source_tier = _tier(giver, source.tier)
        target_tier = _tier(taker, target.tier)
        if (giver, source_tier) == (taker, target_tier):
            raise Refusal(422, "same_place", "source and target are the same tier")
        if not taker.tiers[target_tier].writable:
            raise Refusal(
                409, "not_writable", f"tier {target.tier!r} of {target.instance!r} is not written"
            )
        for record in (giver, taker):
            if not self._registry.is_live(record):
                raise Refusal(409, "instance_lost", f"instance {record.name!r} is lost")
        peer = "" if giver is taker else _channel(giver)
        if peer:
            _channel(taker)
        steps: list[Step] = []
        for model, part in by_model(chosen, self._names):
            keys = await self._held(giver, source_tier, part)
            most = _slice_keys(model, giver, taker) if peer else SLICE_KEYS
            chained = part.keys is not None and len(keys) == len(part.keys) <= most
            for start in range(0, len(keys), most):
                joined = wire.join(keys[start : start + most])
                after = (len(steps) - 1,) if steps else ()
                order = wire.Copy(
                    id=_NEW,
                    source=source.tier,
                    target=target.tier,
                    keys=joined,
                    kinds=model.kinds,
                    chained=chained,
                )
                if peer:
                    steps += _between(len(steps), after, order, giver, taker, peer, move)
                else:
                    steps += _within(len(steps), after, order, giver, move)
        return steps

    def recode(
        self, chosen: Chosen, *, tier: str, instances: Sequence[str], codec: str, level: str
    ) -> list[Step]:
        """One part an instance and model.

        Raises:
            Refusal: an unknown place or model, or nobody has such a tier.
        """
        if instances:
            records = [self._holder(name) for name in dict.fromkeys(instances)]
            for record in records:
                _tier(record, tier)
        else:
            records = [r for r in self._registry.live() if r.tier_number(tier) is not None]
        if not records:
            raise _no_tier(tier, "any live instance")
        steps = []
        for model, part in by_model(chosen, self._names):
            order = wire.Recode(
                id=_NEW,
                tier=tier,
                codec=codec,
                level=level,
                keys=None if part.keys is None else wire.join(part.keys),
                tags=() if part.keys is not None else tuple(sorted(part.tags or ())),
                kinds=model.kinds,
            )
            steps += [Step(instance=record.name, order=order) for record in records]
        return steps

    async def _held(self, record: Record, tier: int, chosen: Chosen) -> list[bytes]:
        directory = self._registry.directory
        if chosen.keys is not None:
            return directory.among(record.slot, tier, chosen.keys)
        return sorted(await directory.of_tags(record.slot, tier, chosen.tags))

    def _holders(self, instances: Sequence[str]) -> list[str]:
        """Names of instances that hold chunks; of all when none is named."""
        if instances:
            for name in instances:
                self._known(name)
            return sorted(set(instances))
        leased: Iterable[LeaseRecord] = self._documents.all("lease").values()
        return sorted(
            {record.name for record in self._registry.records.values() if record.kind != "engine"}
            | {lease.name for lease in leased if lease.kind != "engine"}
        )

    def _with_tiers(
        self, names: Sequence[str], tiers: Sequence[str], asked: Sequence[str]
    ) -> list[str]:
        """Those of ``names`` that have one of ``tiers``, or have not told yet."""
        found = []
        for name in names:
            record = self._registry.records.get(name)
            has = [t for t in tiers if record is None or record.tier_number(t) is not None]
            if record is not None and asked and len(has) < len(tiers):
                raise _no_tier(next(t for t in tiers if t not in has), repr(name))
            if has or (record is not None and record.status is None):
                found.append(name)
        if not found:
            raise _no_tier(tiers[0], "any instance")
        return found

    def _known(self, name: str) -> None:
        """Nothing, for an instance with chunks that some controller has heard of."""
        lease: LeaseRecord | None = self._documents.find("lease", name)
        if name in self._registry.records or lease is None:
            self._holder(name)

    def _holder(self, name: str) -> Record:
        record = self._registry.named(name)
        if record.kind == "engine":
            node = self._registry.node_of(record)
            raise Refusal(
                409,
                "no_cache",
                f"engine {name!r} holds no chunks",
                hint=f"its node server does: {node.name}" if node else "its node server does",
            )
        return record


def _within(
    number: int, after: tuple[int, ...], order: wire.Copy, record: Record, move: bool
) -> list[Step]:
    """Copy, and clear at the source what was confirmed."""
    steps = [Step(instance=record.name, order=order, after=after)]
    if move:
        steps.append(_drop(number, record, order.source))
    return steps


def _between(
    number: int,
    after: tuple[int, ...],
    order: wire.Copy,
    giver: Record,
    taker: Record,
    peer: str,
    move: bool,
) -> list[Step]:
    """Hold at the giver, read from there, clear there what was confirmed, hold no more."""
    host = giver.tiers[0].name
    # One a slice; see `Jobs`, which adds the job's id.
    pin = f"{SLICE_PIN}{number}"
    hold = wire.Copy(
        id=_NEW,
        source=order.source,
        target=host,
        keys=order.keys,
        kinds=order.kinds,
        pin=pin,
        chained=order.chained,
    )
    take = wire.Copy(
        id=_NEW,
        source=taker.tiers[0].name,
        target=order.target,
        keys=b"",
        kinds=order.kinds,
        peer=peer,
        chained=order.chained,
    )
    steps = [
        Step(instance=giver.name, order=hold, after=after),
        Step(instance=taker.name, order=take, after=(number,), needs=(number,), keys_of=number),
    ]
    if move:
        steps.append(_drop(number + 1, giver, order.source))
    last = number + len(steps) - 1
    release = wire.Unpin(id=_NEW, pin=pin)
    steps.append(
        Step(instance=giver.name, order=release, after=tuple({number, last}), cleanup=True)
    )
    return steps


def _slice_keys(model: wire.Model, *records: Record) -> int:
    """How many chunks of ``model`` go through the host tiers at a time."""
    largest = max(kind.layout.payload_bytes for kind in model.kinds)
    limits = [record.tiers[0].capacity_bytes for record in records]
    host_bytes = min(
        (limit for limit in limits if limit), default=SLICE_KEYS * largest * HOST_SHARE
    )
    return max(1, min(SLICE_KEYS, host_bytes // HOST_SHARE // largest))


def _drop(number: int, record: Record, tier: str) -> Step:
    """Clear in ``tier`` what part ``number`` holds elsewhere."""
    order = wire.Clear(id=_NEW, tiers=(tier,), keys=b"")
    return Step(instance=record.name, order=order, after=(number,), needs=(number,), keys_of=number)


def _tier(record: Record, name: str) -> int:
    number = record.tier_number(name)
    if number is None:
        raise _no_tier(name, repr(record.name), [tier.name for tier in record.tiers])
    return number


def _channel(record: Record) -> str:
    channel = record.status.channel if record.status is not None else ""
    if not channel:
        raise Refusal(
            409,
            "no_channel",
            f"instance {record.name!r} has no channel to other instances",
            hint="set channel in its configuration",
        )
    return channel


def _no_tier(name: str, where: str, known: Sequence[str] = ()) -> Refusal:
    hint = f"it has {', '.join(known)}" if known else "GET /v1/instances lists them"
    return Refusal(404, "not_found", f"there is no tier {name!r} at {where}", hint=hint)
