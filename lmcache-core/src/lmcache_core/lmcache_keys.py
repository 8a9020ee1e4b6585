"""LMCache 0.5.6's own settings: what becomes of each when its YAML or variables come here.

Names and defaults are those of LMCache's ``v1/config.py``; docs/configuration.md shows the
table.  A key that holds LMCache's default, or nothing, is accepted whatever its fate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from lmcache_core.sdk import ConfigError

Fate = Literal["mapped", "ignored", "refused"]
GIB = 1 << 30

_PD = ("pd_role pd_buffer_size pd_buffer_device pd_peer_host pd_peer_init_port pd_peer_alloc_port "
       "pd_peer_query_port pd_proxy_host pd_proxy_port pd_allocation_timeout_sec "
       "pd_shutdown_timeout_sec pd_condition_poll_interval_sec pd_max_prefill_len pd_backend_mode "
       "pd_skip_proxy_notification pd_bidirectional transfer_channel nixl_backends "
       "nixl_buffer_size nixl_buffer_device")  # fmt: skip
_GROUPS: tuple[tuple[Fate, str, str], ...] = (
    ("mapped", "our key of the same name", "chunk_size"),
    ("mapped", "host tier, in GiB", "max_local_cpu_size"),
    ("mapped", "huge_pages", "local_cpu_use_hugepages"),
    ("mapped", "tier file://PATH", "local_disk"),
    ("mapped", "size of that tier, in GiB", "max_local_disk_size"),
    ("mapped", "tier at that URL, named remote; mooncakestore:// becomes mooncake://, resp:// and "
     "valkey:// redis://, fs:// file://", "remote_url"),
    ("mapped", "codec of that tier: cachegen; naive is none", "remote_serde"),
    ("mapped", "tier gds://PATH", "gds_path"),
    ("mapped", "store_decode", "save_decode_cache"),
    ("mapped", "store_partial_chunk", "save_unfull_chunk"),
    ("mapped", "deadline_s of the tiers made from these keys", "blocking_timeout_secs"),
    ("mapped", "lookup_deadline_s", "lookup_timeout_ms"),
    ("mapped", "load: async", "enable_async_loading"),
    ("mapped", "hash_algorithm for blake3; else sha256, alike in every process",
     "pre_caching_hash_algorithm"),
    ("ignored", "the host tier is always there; give it a small size", "local_cpu"),
    ("ignored", "the host tier is LRU, suffixes first", "cache_policy"),
    ("ignored", "numa_node says where", "numa_mode"),
    ("ignored", "the arena is reserved whole and filled while the engine starts",
     "reserve_local_cpu_size enable_lazy_memory_allocator lazy_memory_initial_ratio "
     "lazy_memory_expand_trigger_ratio lazy_memory_step_ratio lazy_memory_safe_size"),
    ("ignored", "chunks are copied whole, beside the forward pass", "use_layerwise"),
    ("ignored", "a backend has its own options, in the URL",
     "local_disk_path_sharding gds_path_sharding gds_buffer_size use_gds gds_backend "
     "maru_pool_size extra_config"),
    ("ignored", "every pin says how long it lasts", "pin_timeout_sec pin_check_interval_sec"),
    ("ignored", "give instance", "lmcache_instance_id"),
    ("ignored", "vLLM's kv_events_config decides", "enable_kv_events"),
    ("ignored", "every hit is loaded", "min_retrieve_tokens hit_miss_ratio"),
    ("ignored", "no statistics beside the metrics",
     "enable_chunk_statistics chunk_statistics_auto_start_statistics "
     "chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_exit_target_unique_chunks "
     "chunk_statistics_strategy"),
    ("ignored", "no listener is started inside the engine",
     "internal_api_server_enabled internal_api_server_host internal_api_server_port_start "
     "internal_api_server_include_index_list internal_api_server_socket_path_prefix"),
    ("ignored", "no daemon of LMCache is asked", "mp_host mp_port"),
    ("ignored", "lookups run in the scheduler's process",
     "lookup_server_worker_ids enable_scheduler_bypass_lookup"),
    ("ignored", "names nothing here",
     "app_id priority_limit py_enable_gc use_gpu_connector_v3 "
     "lmcache_worker_ports lmcache_worker_ids lmcache_worker_heartbeat_delay_time "
     "lmcache_worker_heartbeat_time controller_pull_url controller_reply_url "
     "p2p_host p2p_init_ports p2p_lookup_ports script_allowed_imports blend_recompute_ratios "
     "blend_thresholds blend_check_layers blend_min_tokens blend_special_str "
     "max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode " + _PD),
    ("refused", "reuse of chunks that are no prefix changes the model's output",
     "enable_blending"),
    ("refused", "give kv_role, channel and channel_token_file, and run lmc pd-proxy",
     "enable_pd"),
    ("refused", "give channel, channel_token_file and peers", "enable_p2p"),
    ("refused", "give controllers and controller_token_file, and run lmc controller",
     "enable_controller"),
    ("refused", "hidden states are not cached", "enable_hidden_state_cache"),
    ("refused", "install a backend package and name its URL in tiers",
     "storage_plugins remote_storage_plugins maru_path audit_actual_remote_url"),
    ("refused", "order the tiers, and give each its write policy",
     "retrieve_locations store_location"),
    ("refused", "the index is ours", "external_lookup_client"),
    ("refused", "it runs code that a setting names",
     "runtime_plugin_locations run_script_api_enabled"),
    ("refused", "settings are not fetched over the network", "remote_config_url"),
)  # fmt: skip

_DEFAULTS: dict[str, Any] = {
    "local_cpu": True, "cache_policy": "LRU", "remote_serde": "naive", "mp_port": 5555,
    "local_disk_path_sharding": "by_gpu", "gds_path_sharding": "by_gpu", "use_gds": True,
    "gds_backend": "cufile", "internal_api_server_host": "127.0.0.1", "py_enable_gc": True,
    "internal_api_server_port_start": 6999, "pin_timeout_sec": 300, "pin_check_interval_sec": 30,
}  # fmt: skip
TIER_KEYS = ("local_disk", "gds_path", "remote_url")
TIER_DETAILS = ("max_local_disk_size", "blocking_timeout_secs", "remote_serde")
"""They say more about the tiers that `TIER_KEYS` make."""
RENAMED = {
    "enable_xpyd": "enable_pd", "nixl_role": "pd_role", "nixl_peer_host": "pd_peer_host",
    "nixl_peer_port": "pd_peer_init_port", "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port", "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port", "controller_url": "controller_pull_url",
    "lmcache_worker_port": "lmcache_worker_ports", "plugin_locations": "runtime_plugin_locations",
    "external_backends": "storage_plugins",
}  # fmt: skip
"""Names of LMCache's earlier releases, and what it calls them now."""
_SCHEMES = {"mooncakestore": "mooncake", "resp": "redis", "valkey": "redis", "fs": "file"}
_NOT_TIERS = {
    "lm": "LMCache's own server has a protocol of its own",
    "redis-sentinel": "sentinel addresses have no tier yet",
    "redis-cluster": "cluster addresses have no tier yet",
    "plugin": "install a backend package and name its URL in tiers",
    "external": "install a backend package and name its URL in tiers",
    "audit": "every chunk below host has checksums",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One of LMCache's settings: ``note`` is what it becomes, or why it does not."""

    name: str
    fate: Fate
    note: str


KEYS: dict[str, Key] = {
    name: Key(name, fate, note) for fate, note, names in _GROUPS for name in names.split()
}
"""Every key of LMCache 0.5.6, by name."""


@dataclass(frozen=True, slots=True)
class Translated:
    """Our settings: their values, the LMCache key that each was made from, and warnings."""

    values: dict[str, Any]
    made_from: dict[str, str]
    warnings: list[str]


def translate(values: Mapping[str, Any]) -> Translated:
    """Our settings for the LMCache keys among ``values``.

    ``chunk_size`` is ours too and is not looked at.

    Raises:
        ConfigError: a refused key, or a value that can't be mapped.
    """
    theirs = {k: v for k, v in values.items() if k in KEYS and k != "chunk_size"}
    warnings: list[str] = []
    for name, value in theirs.items():
        key = KEYS[name]
        if key.fate == "mapped" or asks_for_nothing(name, value):
            continue
        if key.fate == "refused":
            raise ConfigError(f"LMCache's {name} is refused: {key.note}", hint=f"remove {name}")
        warnings.append(f"LMCache's {name} is ignored: {key.note}")
    made = _scalars(theirs)
    tiers = _tiers(theirs)
    if tiers:
        made["tiers"] = (next(name for name in TIER_KEYS if theirs.get(name)), tiers)
    return Translated(
        {ours: value for ours, (_, value) in made.items()},
        {ours: name for ours, (name, _) in made.items()},
        warnings,
    )


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether ``value`` is what LMCache does without the key ``name``."""
    return value is None or (value == _DEFAULTS[name] if name in _DEFAULTS else not value)


def _scalars(theirs: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Our key -> LMCache's key and the value."""
    made: dict[str, tuple[str, Any]] = {}
    for name, ours, factor in (
        ("max_local_cpu_size", "host_bytes", GIB),
        ("lookup_timeout_ms", "lookup_deadline_s", 0.001),
    ):
        if theirs.get(name) is not None:
            number = _number(theirs, name) * factor
            made[ours] = (name, int(number) if factor == GIB else number)
    for name, ours in (
        ("local_cpu_use_hugepages", "huge_pages"),
        ("save_decode_cache", "store_decode"),
        ("save_unfull_chunk", "store_partial_chunk"),
    ):
        if theirs.get(name) is not None:
            made[ours] = (name, theirs[name])
    if _flag(theirs, "enable_async_loading"):
        made["load"] = ("enable_async_loading", "async")
    if theirs.get("pre_caching_hash_algorithm") == "blake3":
        made["hash_algorithm"] = ("pre_caching_hash_algorithm", "blake3")
    return made


def _tiers(theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    tiers: list[dict[str, Any]] = []
    if theirs.get("local_disk"):
        url = _directory(theirs, "local_disk", "file")
        if not theirs.get("max_local_disk_size"):
            raise ConfigError(
                "local_disk without max_local_disk_size, so LMCache would keep no disk tier",
                hint="give max_local_disk_size, in GiB, or remove local_disk",
            )
        size = int(_number(theirs, "max_local_disk_size") * GIB)
        tiers.append({"url": url, "size_bytes": size})
    if theirs.get("gds_path"):
        tiers.append({"url": _directory(theirs, "gds_path", "gds")})
    if theirs.get("remote_url"):
        # Its own name: with fs:// it would be a second tier named disk.
        tiers.append({"url": _remote_url(theirs), "name": "remote"} | _codec(theirs))
    if theirs.get("blocking_timeout_secs") is not None:
        for tier in tiers:
            tier["deadline_s"] = _number(theirs, "blocking_timeout_secs")
    return tiers


def _codec(theirs: Mapping[str, Any]) -> dict[str, Any]:
    serde = theirs.get("remote_serde") or "naive"
    if serde not in ("naive", "cachegen"):
        raise ConfigError(
            f"remote_serde: {serde!r} is no codec here",
            hint="lmc codec list shows what is installed; name it as codec of the tier under tiers",
        )
    return {} if serde == "naive" else {"codec": serde}


def _number(theirs: Mapping[str, Any], name: str) -> float:
    try:
        number = msgspec.convert(theirs[name], float, strict=False)
    except msgspec.ValidationError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ConfigError(f"{name}: {theirs[name]!r} is not a number", hint="write it like 5.0")
    return number


def _flag(theirs: Mapping[str, Any], name: str) -> bool:
    value = theirs.get(name)
    try:
        return value is not None and msgspec.convert(value, bool, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{name}: neither true nor false", hint="write true or false") from None


def _directory(theirs: Mapping[str, Any], name: str, scheme: str) -> str:
    path = str(theirs[name]).removeprefix("file://")
    if not path.startswith("/") or "," in path:
        raise ConfigError(
            f"{name} is not one absolute directory",
            hint="write file:///nvme/kv, or one tier a directory under tiers",
        )
    return f"{scheme}://{quote(path.rstrip('/') or '/')}"


def _remote_url(theirs: Mapping[str, Any]) -> str:
    scheme, colon, rest = str(theirs["remote_url"]).partition("://")
    reason = _NOT_TIERS.get(scheme, "") if colon else "it is not a URL"
    if "," in rest.rpartition("@")[2].partition("/")[0]:
        reason = reason or "it names several hosts"
    if reason:
        # Without its scheme it may be anything, a password too.
        named = f"no backend serves {scheme}://: " if colon else ""
        raise ConfigError(
            f"remote_url: {named}{reason}",
            hint="name the tier under tiers; lmc backends lists what is installed",
        )
    if scheme == "fs":
        return f"file:///{rest.partition('/')[2]}"
    return f"{_SCHEMES.get(scheme, scheme)}://{rest}"
