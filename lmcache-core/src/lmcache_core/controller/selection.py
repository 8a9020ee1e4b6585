"""Which chunks a request means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import anyio.to_thread

from lmcache_core.agent import wire
from lmcache_core.agent.wire import tenant_id
from lmcache_core.controller.messages import MAX_KEYS, Selection
from lmcache_core.controller.names import Names
from lmcache_core.controller.problem import Refusal, not_found
from lmcache_core.controller.questions import Questions
from lmcache_core.controller.registry import Registry
from lmcache_core.keys import TAG_BYTES, ChunkHasher, Namespace
from lmcache_core.sdk import ConfigError

_ONE_WAY = "give exactly one of tokens, text, keys, all, or a model or tenant or both"
_THREAD_TOKENS = 65_536
"""More tokens are hashed off the event loop: more than a few milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a `Selection` means: keys, or everything of some namespaces.

    Attributes:
        model: of a prefix, or of keys of one model.
        prefix: keys of the first kind, in order, that a lookup counts; of keys: these.
        keys: of every kind; None: everything of ``tags``.
        tags: None: of every namespace.
        prompt_tokens: that were given.
    """

    model: wire.Model | None = None
    prefix: list[bytes] = field(default_factory=list)
    keys: list[bytes] | None = None
    tags: frozenset[bytes] | None = frozenset()
    prompt_tokens: int = 0


async def choose(
    selection: Selection, *, names: Names, registry: Registry, questions: Questions
) -> Chosen:
    """What ``selection`` means.

    Raises:
        Refusal: it means nothing, several things, or something unknown.
    """
    _one_way(selection)
    if selection.keys is not None:
        return _of_keys(selection.keys, names)
    if selection.tokens is not None or selection.text is not None:
        if selection.tenant_id is not None:
            raise Refusal(
                422,
                "bad_selection",
                "the prefix of a tenant needs its salt",
                hint="give tenant, not tenant_id",
            )
        model = _model(selection.model, names, registry)
        tokens = selection.tokens
        if tokens is None:
            tokens = await _tokenized(selection.text or "", model, registry, questions)
        return await _of_tokens(tokens, model, selection)
    if selection.all:
        return Chosen(tags=None)
    return Chosen(tags=frozenset(_scope(selection, names)))


def by_model(chosen: Chosen, names: Names) -> list[tuple[wire.Model, Chosen]]:
    """``chosen`` apart by model, for orders that must say what the chunks' bytes are.

    Raises:
        Refusal: some of it is of an unknown model.
    """
    if chosen.keys is not None:
        groups: dict[bytes, list[bytes]] = {}
        for key in chosen.keys:
            groups.setdefault(key[:TAG_BYTES], []).append(key)
        apart = [(tag, Chosen(keys=keys)) for tag, keys in groups.items()]
    else:
        tags = names.tags(bases=None, tenant=None) if chosen.tags is None else chosen.tags
        apart = [(tag, Chosen(tags=frozenset((tag,)))) for tag in sorted(tags)]
    found: dict[bytes, tuple[wire.Model, list[Chosen]]] = {}
    for tag, part in apart:
        models = [chosen.model] if chosen.model is not None else names.models_of(tag)
        if not models or models[0] is None:
            raise Refusal(
                409,
                "unknown_model",
                f"nothing is known of namespace {tag.hex()}",
                hint="the model of these chunks must have been served once",
            )
        found.setdefault(models[0].tag, (models[0], []))[1].append(part)
    return [(model, _joined(parts)) for model, parts in found.values()]


def _joined(parts: Sequence[Chosen]) -> Chosen:
    keys = [key for part in parts for key in part.keys or ()]
    tags = frozenset(tag for part in parts for tag in part.tags or ())
    return Chosen(keys=keys or None, tags=tags)


def _one_way(selection: Selection) -> None:
    prefix = [selection.tokens, selection.text]
    ways = sum(given is not None for given in (*prefix, selection.keys)) + selection.all
    tenant = selection.tenant is not None or selection.tenant_id is not None
    scope = bool(selection.model) or tenant
    named = any(given is not None for given in prefix)
    if ways + (scope and not named) != 1:
        raise Refusal(422, "bad_selection", "this selects nothing, or in two ways", hint=_ONE_WAY)
    if selection.lora and not named:
        raise Refusal(422, "bad_selection", "lora is for tokens and text only")
    if selection.tenant is not None and selection.tenant_id is not None:
        raise Refusal(422, "bad_selection", "give one of tenant and tenant_id")


def _of_keys(hexed: Sequence[str], names: Names) -> Chosen:
    keys = list(dict.fromkeys(bytes.fromhex(text) for text in hexed))
    models = {m.tag: m for key in keys for m in names.models_of(key[:TAG_BYTES])[:1]}
    model = next(iter(models.values())) if len(models) == 1 else None
    return Chosen(model=model, prefix=keys, keys=keys)


def _scope(selection: Selection, names: Names) -> set[bytes]:
    if names.lack:
        raise Refusal(
            409,
            "names_incomplete",
            f"instances named {names.lack}: not all that this selects is known",
            hint="raise --max-namespaces or --max-models, or select by tokens, text, keys or all",
        )
    bases = None
    if selection.model:
        bases = {model.tag for model in _named(selection.model, names.models())}
        if not bases:
            raise not_found("model", selection.model, hint=_known(names.models()))
    tenant = selection.tenant_id
    if selection.tenant is not None:
        tenant = tenant_id(selection.tenant or None)
    tags = names.tags(bases=bases, tenant=tenant)
    if not tags:
        raise Refusal(404, "not_found", "nothing is known of this tenant")
    return tags


def _model(wanted: str, names: Names, registry: Registry) -> wire.Model:
    """The one model that is meant: of those that are served now, if any is."""
    known = names.models()
    found = _named(wanted, known) if wanted else known
    if not found:
        raise not_found("model", wanted, hint=_known(known))
    served = {model.tag: model for record in registry.live() for model in record.models.values()}
    live = {model.tag: served[model.tag] for model in found if model.tag in served}
    found = list(live.values()) or list({model.tag: model for model in found}.values())
    if len(found) > 1:
        raise Refusal(
            409,
            "ambiguous_model",
            f"{len(found)} models are meant: {_known(found)}",
            hint="give model as NAME@TAG",
        )
    return found[0]


def _named(wanted: str, models: Iterable[wire.Model]) -> list[wire.Model]:
    return [model for model in models if wanted in (model.name, _full_name(model))]


def _full_name(model: wire.Model) -> str:
    return f"{model.name}@{model.tag.hex()}"


def _known(models: Sequence[wire.Model]) -> str:
    if not models:
        return "no model was ever served"
    shown = sorted({_full_name(model) for model in models})
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


async def _tokenized(
    text: str, model: wire.Model, registry: Registry, questions: Questions
) -> list[int]:
    for record in registry.live():
        if model.tag in record.models and record.status is not None and record.status.tokenizer:
            return await questions.tokenize(record, text)
    raise Refusal(
        409,
        "no_tokenizer",
        f"no live instance tokenizes for {model.name!r}",
        hint="give tokens, or start an engine that serves it",
    )


async def _of_tokens(tokens: list[int], model: wire.Model, selection: Selection) -> Chosen:
    chunks = len(tokens) // model.chunk_size
    if chunks * len(model.kinds) > MAX_KEYS:
        raise Refusal(422, "too_many_chunks", f"the prefix has more than {MAX_KEYS} chunks")
    extra: dict[str, object] = {}
    if selection.tenant:
        extra["tenant_salt"] = selection.tenant
    if selection.lora:
        extra["lora"] = selection.lora
    try:
        namespace = Namespace.from_pairs(model.pairs)
        namespace = namespace.derive(**extra) if extra else namespace
        hasher = ChunkHasher(namespace, chunk_size=model.chunk_size, algorithm=model.hash_algorithm)
        if len(tokens) > _THREAD_TOKENS:
            digests = await anyio.to_thread.run_sync(hasher.digests, tokens)
        else:
            digests = hasher.digests(tokens)
    except ConfigError as error:
        raise Refusal(409, "no_identity", error.message, hint=error.hint) from error
    heads = [namespace.tag + digest for digest in digests]
    prefix = [head + model.kinds[0].suffix for head in heads]
    keys = [head + kind.suffix for kind in model.kinds for head in heads]
    return Chosen(
        model=model,
        prefix=prefix,
        keys=keys,
        tags=frozenset((namespace.tag,)),
        prompt_tokens=len(tokens),
    )
