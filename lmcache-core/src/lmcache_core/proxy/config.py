"""Which engines the proxy stands before, and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from lmcache_core.sdk import ConfigError

_DECODE_HINT = "write http://127.0.0.1:8200@tcp://127.0.0.1:7001"
_PREFILL_HINT = "write http://127.0.0.1:8100"


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine's HTTP address.

    Attributes:
        url: without a slash at its end.
        channel: where a decoder takes pages; "" for a prefiller.
    """

    url: str
    channel: str = ""

    @classmethod
    def prefiller(cls, text: str) -> Engine:
        """The engine of ``URL``.

        Raises:
            ConfigError: no HTTP URL, or more than scheme, host, port and path.
        """
        return cls(_http(text, _PREFILL_HINT))

    @classmethod
    def decoder(cls, text: str) -> Engine:
        """The engine of ``URL@CHANNEL``.

        Raises:
            ConfigError: no channel behind ``@``, or one of the two is no address.
        """
        url, at, channel = text.rpartition("@")
        if not at:
            raise ConfigError(f"{text!r} names no channel", op="pd-proxy", hint=_DECODE_HINT)
        url = _http(url, _DECODE_HINT)
        parts = _split(channel, _DECODE_HINT)
        if parts.path or parts.query or parts.fragment or parts.port is None:
            raise ConfigError(
                f"{channel!r} is no SCHEME://HOST:PORT", op="pd-proxy", hint=_DECODE_HINT
            )
        return cls(url, channel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """What `lmcache_core.proxy.app.build` serves.

    Attributes:
        prefillers: none means that decoders prefill themselves.
        decoders: at least one.
        token: asked of clients as ``Authorization: Bearer``; "" asks nothing.
        max_body_bytes: of a request.
        max_in_flight: requests at a time; further ones get 429.
        connect_timeout_s: until an engine's connection stands.
        stall_timeout_s: between two pieces of an engine's answer, and for a client to take one.
        retry_s: how long a failed engine is left alone.

    Raises:
        ConfigError: an engine or channel that is named twice, no decoder, a limit out of range.
    """

    prefillers: tuple[Engine, ...]
    decoders: tuple[Engine, ...]
    token: str = field(default="", repr=False)
    max_body_bytes: int = 16 << 20
    max_in_flight: int = 256
    connect_timeout_s: float = 5.0
    stall_timeout_s: float = 600.0
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not self.decoders:
            raise ConfigError("there is no decoder", op="pd-proxy", hint="give --decode")
        urls = [engine.url for engine in (*self.prefillers, *self.decoders)]
        channels = [engine.channel for engine in self.decoders]
        for named in (urls, channels):
            twice = sorted({text for text in named if named.count(text) > 1})
            if twice:
                raise ConfigError(
                    f"{twice[0]} is named twice", op="pd-proxy", hint="name each engine once"
                )
        for name in ("connect_timeout_s", "stall_timeout_s", "retry_s"):
            if not 0 < getattr(self, name) <= 86400:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", op="pd-proxy", hint="give 0 to 86400 s"
                )
        for name in ("max_body_bytes", "max_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", op="pd-proxy", hint="give 1 or more"
                )


def _http(text: str, hint: str) -> str:
    parts = _split(text, hint)
    if parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise ConfigError(f"{text!r} is no http://HOST:PORT", op="pd-proxy", hint=hint)
    return text.rstrip("/")


def _split(text: str, hint: str) -> SplitResult:
    if "@" in text:
        # Not shown: what stands before it may be a password.
        raise ConfigError("an address has a user or password in it", op="pd-proxy", hint=hint)
    try:
        parts = urlsplit(text)
        if parts.scheme and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise ConfigError(f"{text!r} is no address", op="pd-proxy", hint=hint)
