"""The contract between core and its backends: standard library and pluggy only.

A backend imports from here and from nowhere else in core.
"""

from lmcache_core.sdk.abandoning import AbandoningLoop
from lmcache_core.sdk.api import API_VERSION, BACKEND_GROUP
from lmcache_core.sdk.base import BaseConnector
from lmcache_core.sdk.batch import BatchLoop, TargetTooSmall, ValueCorrupt, status_of_oserror
from lmcache_core.sdk.buffers import Buffer, MemoryKind, Region, ReleaseToken
from lmcache_core.sdk.capabilities import Capabilities, Durability, OnExisting, Sharing
from lmcache_core.sdk.channel import (
    CHANNEL_API_VERSION,
    CHANNEL_GROUP,
    MAX_GRANT_BYTES,
    Access,
    ChannelCapabilities,
    ChannelHost,
    ChannelPlugin,
    Grant,
    PeerRefused,
    Piece,
    TransferChannel,
)
from lmcache_core.sdk.codec import (
    CODEC_API_VERSION,
    CODEC_GROUP,
    ELEMENT_BYTES,
    CannotDecode,
    CannotEncode,
    Codec,
    CodecInfo,
    Encoded,
    KVTensor,
    PayloadShape,
)
from lmcache_core.sdk.connector import (
    CLOSE_LIMIT_S,
    MAX_KEY_BYTES,
    OPTIONAL_PROTOCOLS,
    Health,
    OpContext,
    RemoteConnector,
    ScanEntry,
    SupportsLeases,
    SupportsRegions,
    SupportsScan,
    SupportsSubmit,
)
from lmcache_core.sdk.errors import (
    BackendClosed,
    BackendUnavailable,
    ConfigError,
    ContractViolation,
    LMCacheError,
    Unsupported,
)
from lmcache_core.sdk.fileops import FileEntry, FileOps, OsFileOps
from lmcache_core.sdk.grants import Grants, Part
from lmcache_core.sdk.guarded import GuardedLoop
from lmcache_core.sdk.handshake import Introduction
from lmcache_core.sdk.hookspecs import (
    BackendHooks,
    BackendInfo,
    Counter,
    HostServices,
    OptionSpec,
    OptionValue,
    Probe,
    hookimpl,
)
from lmcache_core.sdk.links import Endpoint, Link, Listener, dial
from lmcache_core.sdk.ranges import check_ranges
from lmcache_core.sdk.status import GetResult, Status
from lmcache_core.sdk.value_files import ValueFiles, directory_of, writable
from lmcache_core.sdk.workers import LeftBehind, Pending, Workers

__all__ = [
    "AbandoningLoop",
    "Access",
    "API_VERSION",
    "BACKEND_GROUP",
    "BackendClosed",
    "BackendHooks",
    "BackendInfo",
    "BackendUnavailable",
    "BaseConnector",
    "BatchLoop",
    "Buffer",
    "CannotDecode",
    "CannotEncode",
    "Capabilities",
    "CHANNEL_API_VERSION",
    "CHANNEL_GROUP",
    "ChannelCapabilities",
    "ChannelHost",
    "ChannelPlugin",
    "CLOSE_LIMIT_S",
    "Codec",
    "CODEC_API_VERSION",
    "CODEC_GROUP",
    "CodecInfo",
    "ConfigError",
    "ContractViolation",
    "Counter",
    "Durability",
    "ELEMENT_BYTES",
    "Encoded",
    "Endpoint",
    "FileEntry",
    "FileOps",
    "GetResult",
    "Grant",
    "Grants",
    "GuardedLoop",
    "Health",
    "HostServices",
    "Introduction",
    "KVTensor",
    "LeftBehind",
    "Link",
    "Listener",
    "LMCacheError",
    "MAX_GRANT_BYTES",
    "MAX_KEY_BYTES",
    "MemoryKind",
    "OnExisting",
    "OpContext",
    "OPTIONAL_PROTOCOLS",
    "OptionSpec",
    "OptionValue",
    "OsFileOps",
    "Part",
    "PayloadShape",
    "PeerRefused",
    "Pending",
    "Piece",
    "Probe",
    "Region",
    "ReleaseToken",
    "RemoteConnector",
    "ScanEntry",
    "Sharing",
    "Status",
    "SupportsLeases",
    "SupportsRegions",
    "SupportsScan",
    "SupportsSubmit",
    "TargetTooSmall",
    "TransferChannel",
    "Unsupported",
    "ValueCorrupt",
    "ValueFiles",
    "Workers",
    "check_ranges",
    "dial",
    "directory_of",
    "hookimpl",
    "status_of_oserror",
    "writable",
]
