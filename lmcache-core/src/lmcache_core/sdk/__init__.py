"""The contract between core and its backends: standard library and pluggy only.

A backend imports from here and from nowhere else in core.
"""

from lmcache_core.sdk.abandoning import AbandoningLoop
from lmcache_core.sdk.api import API_VERSION, BACKEND_GROUP
from lmcache_core.sdk.base import BaseConnector
from lmcache_core.sdk.batch import BatchLoop, TargetTooSmall, ValueCorrupt, status_of_oserror
from lmcache_core.sdk.buffers import Buffer, MemoryKind, Region, ReleaseToken
from lmcache_core.sdk.capabilities import Capabilities, Durability, OnExisting, Sharing
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
from lmcache_core.sdk.guarded import GuardedLoop
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
from lmcache_core.sdk.ranges import check_ranges
from lmcache_core.sdk.status import GetResult, Status
from lmcache_core.sdk.value_files import ValueFiles, directory_of, writable
from lmcache_core.sdk.workers import LeftBehind, Pending, Workers

__all__ = [
    "API_VERSION",
    "AbandoningLoop",
    "BACKEND_GROUP",
    "BackendClosed",
    "BackendHooks",
    "BackendInfo",
    "BackendUnavailable",
    "BaseConnector",
    "BatchLoop",
    "Buffer",
    "CLOSE_LIMIT_S",
    "CODEC_API_VERSION",
    "CODEC_GROUP",
    "CannotDecode",
    "CannotEncode",
    "Capabilities",
    "Codec",
    "CodecInfo",
    "ConfigError",
    "ContractViolation",
    "Counter",
    "Durability",
    "ELEMENT_BYTES",
    "Encoded",
    "FileEntry",
    "FileOps",
    "GetResult",
    "GuardedLoop",
    "Health",
    "HostServices",
    "KVTensor",
    "LMCacheError",
    "LeftBehind",
    "MAX_KEY_BYTES",
    "MemoryKind",
    "OPTIONAL_PROTOCOLS",
    "OnExisting",
    "OpContext",
    "OptionSpec",
    "OptionValue",
    "OsFileOps",
    "PayloadShape",
    "Pending",
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
    "Unsupported",
    "ValueCorrupt",
    "ValueFiles",
    "Workers",
    "check_ranges",
    "directory_of",
    "hookimpl",
    "status_of_oserror",
    "writable",
]
