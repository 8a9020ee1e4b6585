"""Quotas of tenants, and the limits that instances get of them."""

from __future__ import annotations

import hashlib

import msgspec

from lmcache_core.agent import wire
from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller import messages
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.documents import Documents
from lmcache_core.controller.names import Names
from lmcache_core.controller.problem import Refusal, not_found
from lmcache_core.controller.records import QuotaRecord
from lmcache_core.controller.registry import Record


class Quotas:
    """Belongs to one event loop.  What is async raises `StoreDown`."""

    def __init__(self, config: ControllerConfig, documents: Documents, names: Names) -> None:
        self._config = config
        self._documents = documents
        self._names = names
        self._changes = 0
        documents.listen(self._heard)

    def all(self) -> list[QuotaRecord]:
        """By tenant and tier."""
        quotas: list[QuotaRecord] = list(self._documents.all("quota").values())
        return sorted(quotas, key=lambda quota: quota.id)

    async def put(self, asked: messages.QuotaRequest) -> QuotaRecord:
        """Set a quota, or replace it.

        Raises:
            Refusal: no tenant, or two, or too many quotas.
        """
        if (asked.tenant is None) == (asked.tenant_id is None):
            raise Refusal(422, "bad_tenant", "give one of tenant and tenant_id")
        tenant = asked.tenant_id
        if tenant is None:
            tenant = tenant_id(asked.tenant or None)
        id = (tenant or "no-salt") + ("" if asked.tier == "*" else f".{asked.tier}")
        known = self._documents.find("quota", id) is not None
        if not known and self._documents.number("quota") >= self._config.max_quotas:
            raise Refusal(409, "too_many_quotas", f"there are {self._config.max_quotas} already")
        quota = QuotaRecord(id=id, tenant_id=tenant, tier=asked.tier, nbytes=asked.bytes)
        await self._documents.write("quota", id, quota)
        return quota

    async def delete(self, id: str) -> None:
        """End a quota.

        Raises:
            Refusal: there is none.
        """
        if await self._documents.load("quota", id) is None:
            raise not_found("quota", id)
        await self._documents.remove("quota", id)

    def limits(self, record: Record) -> tuple[str, tuple[wire.Limit, ...]]:
        """What holds for the namespaces that an instance named, and its version; "" is none."""
        if not self._documents.number("quota"):
            return "", ()
        # An instance has thousands of them, and syncs ten times a second.
        if record.limits is None or record.limits[0] != self._changes:
            record.limits = (self._changes, *self._worked_out(record))
        return record.limits[1:]

    def _worked_out(self, record: Record) -> tuple[str, tuple[wire.Limit, ...]]:
        by_tenant: dict[str, list[QuotaRecord]] = {}
        for quota in self.all():
            by_tenant.setdefault(quota.tenant_id, []).append(quota)
        limits = []
        for tag in sorted(record.tags):
            note = self._names.note(tag)
            for quota in by_tenant.get(note.tenant, ()) if note is not None else ():
                limits.append(wire.Limit(tag, quota.tier, quota.nbytes))
        if not limits:
            return "", ()
        return hashlib.sha256(msgspec.msgpack.encode(limits)).hexdigest()[:16], tuple(limits)

    def _heard(self, kind: str, id: str) -> None:
        self._changes += kind in ("quota", "namespace")


def shown(quota: QuotaRecord) -> messages.Quota:
    """As the API has it."""
    return messages.Quota(
        id=quota.id, tenant_id=quota.tenant_id, tier=quota.tier, bytes=quota.nbytes
    )
