"""Names of models and namespaces: hard state, so that a tenant can be cleared after a restart of
everything."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable

import msgspec

from lmcache_core.agent import wire
from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.documents import Documents, StoreDown
from lmcache_core.controller.problem import Refusal
from lmcache_core.keys import Namespace
from lmcache_core.sdk import ConfigError, ContractViolation


class Names:
    """What namespaces belong to.  Kept in memory when the store is away, and written later.

    Attributes:
        dropped: kind -> how often one was named that there was no room for.
    """

    def __init__(self, config: ControllerConfig, documents: Documents) -> None:
        self._config = config
        self._documents = documents
        self._unwritten: dict[str, dict[str, object]] = {"model": {}, "namespace": {}}
        self._by_tag: dict[bytes, list[wire.Model]] | None = None
        self.dropped: Counter[str] = Counter()
        documents.listen(self._heard)
        documents.on_emptied(self._again)

    async def learn(
        self, models: Iterable[wire.Model], notes: Iterable[wire.NamespaceNote]
    ) -> None:
        """Remember what an instance named, as far as there is room."""
        for model in models:
            self._note("model", _model_id(model), model, self._config.max_models)
        for note in notes:
            self._note("namespace", note.tag.hex(), note, self._config.max_namespaces)
        await self.flush()

    async def flush(self) -> None:
        """Write what could not be written before; a store that is away is tried again later."""
        for kind, waiting in self._unwritten.items():
            if not waiting:
                continue
            batch = dict(waiting)
            try:
                await self._documents.write_all(kind, batch)
            except StoreDown:
                return
            for id, value in batch.items():
                if waiting.get(id) is value:
                    del waiting[id]

    @property
    def lack(self) -> str:
        """Which names are not all known here; "" when none was dropped."""
        most = {"model": self._config.max_models, "namespace": self._config.max_namespaces}
        return " and ".join(f"more than {most[kind]} {kind}s" for kind in sorted(self.dropped))

    def models(self) -> list[wire.Model]:
        """Every model that was ever served, by name."""
        known: dict[str, wire.Model] = self._documents.all("model")
        known.update(self._unwritten["model"])  # type: ignore[arg-type]
        return sorted(known.values(), key=lambda model: (model.name, model.tag))

    def note(self, tag: bytes) -> wire.NamespaceNote | None:
        """What is known of a namespace."""
        id = tag.hex()
        found: wire.NamespaceNote | None = self._documents.find("namespace", id)
        return found or self._unwritten["namespace"].get(id)  # type: ignore[return-value]

    def describe(self, tag: bytes) -> tuple[str, str, str]:
        """Model, tenant id and adapter of a namespace; "" is unknown, or none."""
        note = self.note(tag)
        model = next((model.name for model in self.models_of(tag)), "")
        return model, note.tenant if note else "", note.lora if note else ""

    def models_of(self, tag: bytes) -> list[wire.Model]:
        """Models whose chunks a namespace has."""
        note = self.note(tag)
        if self._by_tag is None:
            self._by_tag = {}
            for model in self.models():
                self._by_tag.setdefault(model.tag, []).append(model)
        return self._by_tag.get(note.base if note else tag, [])

    def tags(self, *, bases: Collection[bytes] | None, tenant: str | None) -> set[bytes]:
        """Namespaces of these models (None: any) and of this tenant (None: any; "": without)."""
        notes: dict[str, wire.NamespaceNote] = self._documents.all("namespace")
        notes.update(self._unwritten["namespace"])  # type: ignore[arg-type]
        found = {
            note.tag
            for note in notes.values()
            if (bases is None or note.base in bases) and (tenant is None or note.tenant == tenant)
        }
        if not tenant:
            named = {note.tag for note in notes.values()}
            plain = bases if bases is not None else {model.tag for model in self.models()}
            found |= {tag for tag in plain if tag not in named or tenant is None}
        return found

    def _note(self, kind: str, id: str, value: object, most: int) -> None:
        if self._documents.find(kind, id) == value:
            return
        waiting = self._unwritten[kind]
        known = self._documents.find(kind, id) is not None or id in waiting
        if not known and self._documents.number(kind) + len(waiting) >= most:
            # Not refused: what the instance holds is known all the same.
            self.dropped[kind] += 1
            return
        waiting[id] = value
        self._heard(kind, id)

    def _again(self) -> None:
        """Names are as true in an empty store; instances tell them only once."""
        for kind, waiting in self._unwritten.items():
            for id, value in self._documents.all(kind).items():
                waiting.setdefault(id, value)

    def _heard(self, kind: str, id: str) -> None:
        if kind == "model":
            self._by_tag = None


def _model_id(model: wire.Model) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(model)).hexdigest()[:32]


def check_model(model: wire.Model) -> None:
    """Nothing, for a model that can be.

    Raises:
        Refusal: its tag is not that of its identity, or its layouts are none.
    """
    try:
        tag = Namespace.from_pairs(model.pairs).tag
        for kind in model.kinds:
            kind.layout.layout()
    except (ConfigError, ContractViolation) as error:
        raise Refusal(400, "bad_sync", f"a model that can't be: {error.message}") from error
    if tag != model.tag:
        raise Refusal(400, "bad_sync", "a model's tag is not that of its identity")
