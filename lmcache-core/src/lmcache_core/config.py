"""Typed, frozen configuration of an engine; `settings` says where it is read from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from lmcache_core.sdk import ConfigError

_LISTS = ("controllers", "peers")
"""Settings that may also be one text with commas."""
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


class TierConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One tier below the host tier.

    Attributes:
        url: of the backend, such as ``file:///nvme/kv``.
        size_bytes: most bytes that we keep there; 0 leaves it to the store.
        name: in metrics and hit reports; "" takes "disk" for file, else the scheme.
        write: ``through`` stores every chunk at once, ``on_evict`` before the host tier evicts it,
            ``never`` only reads.
        threads: calls at the same time, at most the backend's ``max_concurrency``.
        max_queued: calls that wait for a thread; more are dropped and counted.
        deadline_s: for one operation.
        probe_interval_s: between two probes while the breaker is open.
        failures_to_open: failures in a row that open the breaker; a missed deadline or
            an unavailable backend opens it at once.
        negative_ttl_s: how long a chunk that the store lacked is not asked for again.
        max_negative_keys: how many such chunks are remembered.
        max_lost_bytes: host memory that calls which can't be cancelled may hold; above it
            the tier is not used.
        codec: of the chunks that we store there, such as ``zstd`` or ``cachegen``; "" stores them
            as they are.  What is read says itself how it was encoded.
        codec_level: one of the codec's; "" is its default.  ``auto`` chooses for each chunk among
            no codec, a lossless one and the codec's levels, by the measured speed of the link.
        ttft_target_s: with ``auto``: keep as much quality as brings ``ttft_target_tokens`` tokens
            in this time; 0 brings them as soon as can be.
        ttft_target_tokens: see there.
        max_staging_bytes: host memory that chunks which are being encoded, or are encoded and on
            their way, may hold; at most a quarter of the host tier.
    """

    url: str
    size_bytes: int = 0
    name: str = ""
    write: Literal["through", "on_evict", "never"] = "through"
    threads: int = 4
    max_queued: int = 256
    deadline_s: float = 2.0
    probe_interval_s: float = 1.0
    failures_to_open: int = 3
    negative_ttl_s: float = 1.0
    max_negative_keys: int = 65_536
    max_lost_bytes: int = 256 << 20
    codec: str = ""
    codec_level: str = ""
    ttft_target_s: float = 0.0
    ttft_target_tokens: int = 8192
    max_staging_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        _require_positive(self, "threads", "max_queued", "failures_to_open")
        _require_positive(self, "ttft_target_tokens", "max_staging_bytes")
        if self.ttft_target_s and self.codec_level != "auto":
            raise ConfigError("ttft_target_s without codec_level: auto", hint="set codec_level")
        if self.codec_level and not self.codec:
            raise ConfigError(
                f"codec_level {self.codec_level!r} without a codec", hint="codec: cachegen"
            )
        if not 0 <= self.ttft_target_s <= 3600:
            raise ConfigError(f"ttft_target_s is {self.ttft_target_s}", hint="give 0 to 3600 s")
        _require_duration(self, "deadline_s", "probe_interval_s")


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything an engine or a node server is told.

    Attributes:
        host_bytes: size of the host tier.
        tiers: below it, fastest first.
        chunk_size: tokens in a chunk.
        hash_algorithm: of the prefix chain.
        store_partial_chunk: also store the blocks of a prompt's last chunk that is not full;
            they serve the same prompt again, not a longer one.
        store_decode: also store chunks that decoding fills.
        lookup_deadline_s: how long a request may wait for tiers below host.
        write_ahead_bytes: host memory that is kept free, or written to tiers with ``write:
            on_evict``; 0 takes an eighth of the host tier.
        max_prefetch_bytes: host memory that prefixes of requests which still wait for their
            turn may hold; 0 takes a quarter of the host tier.
        max_pending_store_bytes: host memory that stores not yet confirmed may hold.
        max_buffered_events: KV cache events that wait for the engine to take them.
        close_timeout_s: how long `close` waits for writes that were accepted.
        load: ``sync`` copies before the forward pass, ``async`` beside it, ``auto`` is
            sync while no other request runs.
        copy_threads: threads that copy between device and host.
        huge_pages, prefault, numa_node: of the host tier's memory; -1 leaves NUMA alone.
        node: address of the node server that holds the cache, a path, ``unix:///path`` or
            ``tcp://host:port``; "" keeps it in the engine's process.
        node_token_file: what a TCP node server is shown.
        node_connect_timeout_s: how long the engine's start waits for the node server.
        node_reply_timeout_s: how long one answer of it may take, before it counts as gone.
        node_retry_s: between two attempts to reach it again.
        max_sessions: engines that a node server serves at the same time.
        max_session_bytes: host memory that one of them may write and read at the same time;
            0 takes half of the host tier.
        channel: address of this engine's transfer channel, such as ``tcp://127.0.0.1:7001`` or
            ``nixl+ucx://10.0.0.7:7001``; "" opens none.  Data-parallel rank N has the port that
            is N higher.
        channel_token_file: what engines show each other; `lmc token` makes one.
        peers: channel addresses of engines whose host tiers are asked for what is missing here.
        peer_deadline_s: for one question to a peer, or one read of its chunks.
        transfer_deadline_s: how long a decoder waits for a prefiller before it computes the
            prompt itself.
        transfer_start_s: how long it waits for a prefiller to say that it has the request.
        push_wait_s: how long a prefiller's step may wait for its page copies, so that a decoder
            gets them now and not after the next step.
        transfer_threads: threads that carry chunks to and from other engines.
        max_transfers: prompts that are pushed to decoders at the same time.
        max_expected_bytes: host memory that chunks which prefillers are to write may hold; 0
            takes half of the host tier.
        lend_lease_s: how long a peer may read chunks that it borrowed.
        max_lent_bytes: host memory that is lent at the same time; 0 takes a quarter of the tier.
        controllers: URLs of all controllers, such as ``http://127.0.0.1:9300``; each is told what
            is here, and may give orders.
        controller_token_file: what they are shown; `lmc controller` makes it.
        controller_ca_file: PEM certificates to trust for https; "" takes the system's.
        controller_sync_s: longest time between two syncs.
        instance: our name there, unique; "" is the host's name and the process's number, or for a
            node server the host's name.  Data-parallel rank N adds ``:dpN``.
        ask_directory: ask the controllers which engines have what is missing here; needs a channel.
        tracing: record OpenTelemetry spans of lookups, loads and stores.
        max_pinned_bytes: host memory that pins of controllers may keep; 0 takes half of the tier.
        drain_timeout_s: how long a node server that is told to stop waits for its sessions,
            and then for the tiers below host.
    """

    host_bytes: int = 4 << 30
    tiers: tuple[TierConfig, ...] = ()
    chunk_size: int = 256
    hash_algorithm: Literal["sha256", "blake3"] = "sha256"
    store_partial_chunk: bool = False
    store_decode: bool = True
    lookup_deadline_s: float = 2.0
    write_ahead_bytes: int = 0
    max_prefetch_bytes: int = 0
    max_pending_store_bytes: int = 1 << 30
    max_buffered_events: int = 65_536
    close_timeout_s: float = 5.0
    load: Literal["auto", "sync", "async"] = "auto"
    copy_threads: int = 2
    huge_pages: bool = True
    prefault: bool = True
    numa_node: int = -1
    node: str = ""
    node_token_file: str = ""
    node_connect_timeout_s: float = 5.0
    node_reply_timeout_s: float = 0.25
    node_retry_s: float = 1.0
    max_sessions: int = 256
    max_session_bytes: int = 0
    channel: str = ""
    channel_token_file: str = ""
    peers: tuple[str, ...] = ()
    peer_deadline_s: float = 1.0
    transfer_deadline_s: float = 30.0
    transfer_start_s: float = 5.0
    push_wait_s: float = 0.02
    transfer_threads: int = 4
    max_transfers: int = 256
    max_expected_bytes: int = 0
    lend_lease_s: float = 10.0
    max_lent_bytes: int = 0
    controllers: tuple[str, ...] = ()
    controller_token_file: str = ""
    controller_ca_file: str = ""
    controller_sync_s: float = 0.5
    instance: str = ""
    ask_directory: bool = False
    max_pinned_bytes: int = 0
    tracing: bool = False
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        _require_positive(self, "host_bytes", "chunk_size", "copy_threads", "max_sessions")
        _require_duration(self, "lookup_deadline_s", "close_timeout_s", "drain_timeout_s")
        _require_duration(self, "node_connect_timeout_s", "node_reply_timeout_s", "node_retry_s")
        _require_positive(self, "transfer_threads", "max_transfers")
        _require_duration(self, "peer_deadline_s", "transfer_deadline_s")
        _require_duration(self, "lend_lease_s", "push_wait_s", "transfer_start_s")
        if not 0 < self.controller_sync_s <= 30:
            raise ConfigError(
                f"controller_sync_s is {self.controller_sync_s}", hint="give 0 to 30 s"
            )
        if self.instance and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", self.instance):
            raise ConfigError(
                f"instance {self.instance!r} is no name",
                hint="give up to 128 letters, digits and . _ : -",
            )


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name} is {getattr(config, name)}", hint="give more than 0")


def _require_duration(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) <= 3600:
            raise ConfigError(f"{name} is {getattr(config, name)}", hint="give 0 to 3600 s")


def parse_size(value: object) -> int:
    """Bytes of ``20GiB``, ``500 MB``, ``4096`` or an int.

    Raises:
        ConfigError: not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)\s*", str(value))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{value!r} is not a size", hint='write it like "20GiB" or "500MB"')
    return int(float(match[1]) * unit)


def from_mapping(values: Mapping[str, Any]) -> EngineConfig:
    """`EngineConfig` of plain values; ``tiers`` is a list of ``{"host": SIZE}`` and
    ``{"url": URL, "size": SIZE, ...}``.

    Raises:
        ConfigError: an unknown key (with the nearest name), or a value of the wrong type.
    """
    plain = dict(values)
    tiers = plain.pop("tiers", [])
    if not isinstance(tiers, (list, tuple)):
        raise ConfigError("tiers is not a list", hint="write one '- url: ...' a tier")
    lower: list[TierConfig] = []
    for position, tier in enumerate(tiers):
        if not isinstance(tier, Mapping):
            raise ConfigError(f"tier {position} is not a mapping", hint="- url: file:///nvme/kv")
        if "host" in tier:
            if position or len(tier) > 1:
                raise ConfigError("host must be the first tier, alone", hint="- host: 20GiB")
            plain["host_bytes"] = tier["host"]
            continue
        entry = dict(tier)
        if "size" in entry:
            if "size_bytes" in entry:
                raise ConfigError(f"tiers[{position}]: size and size_bytes", hint="keep one")
            entry["size_bytes"] = entry.pop("size")
        lower.append(_convert(entry, TierConfig, f"tiers[{position}]"))
    config: EngineConfig = _convert(plain, EngineConfig, "config")
    return msgspec.structs.replace(config, tiers=tuple(lower))


def _convert(values: Mapping[str, Any], kind: type[Any], where: str) -> Any:
    known = [field.name for field in msgspec.structs.fields(kind)]
    known += ["size"] if kind is TierConfig else ["tiers"]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {name!r}", hint=hint)
    sized: dict[str, Any] = {}
    for name, value in values.items():
        try:
            sized[name] = parse_size(value) if name.endswith("_bytes") else value
            if name in _LISTS and isinstance(value, str):
                sized[name] = [part.strip() for part in value.split(",") if part.strip()]
        except ConfigError as error:
            raise ConfigError(f"{where}: {name}: {error.message}", hint=error.hint) from None
    try:
        return msgspec.convert(sized, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}", hint="see the documentation of the key") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None
