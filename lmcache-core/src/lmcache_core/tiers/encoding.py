"""What stands between a chunk's slot and a tier: the codec, and the envelope around it.

A lossy codec that will not take a chunk gives way to the lossless one, and that to storing the
chunk as it is, so encoding never loses one.  Reading asks the envelope alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from lmcache_core import envelope
from lmcache_core.codecs.registry import Codecs
from lmcache_core.config import TierConfig
from lmcache_core.envelope import HEADER_BYTES, Verdict
from lmcache_core.layout import ChunkLayout
from lmcache_core.logs import EventLog
from lmcache_core.policy.codec_choice import AS_IS, Chooser, LinkMeter, Way
from lmcache_core.sdk import CannotDecode, CannotEncode, Codec, ConfigError, Status

LOSSLESS = "zstd"
"""Takes what a lossy codec will not."""
AUTO = "auto"
PREPARE_LIMIT_S = 120.0
"""A store waits so long for a codec that is being compiled."""
_PAGE_BYTES = 4096
# The choice of `auto` counts processor time: while chunks are encoded the engine computes beside
# them, while a prefix is decoded it waits.


class Opened(NamedTuple):
    """OK, and by which ``codec`` it was encoded; or CORRUPT, MISS or TIMED_OUT, and why."""

    status: Status
    why: str = ""
    codec: str = ""


class Encoding:
    """Of one tier.  Thread-safe.

    Args:
        count: counts an event under the tier's name; thread-safe.

    Attributes:
        loads, stores: what the tier's link gives.

    Raises:
        ConfigError: the configured codec or level is not there, or needs something.
    """

    def __init__(
        self,
        config: TierConfig,
        codecs: Codecs,
        *,
        count: Callable[[str, int], None] = lambda event, amount: None,
        log: EventLog | None = None,
    ) -> None:
        self._config = config
        self._codecs = codecs
        self._count = count
        self._log = log or EventLog()
        self._said: set[tuple[str, str]] = set()
        self._scratch = threading.local()
        self.loads, self.stores = LinkMeter(), LinkMeter()
        self._chooser: Chooser | None = None
        self._ways: tuple[Way, ...] = ()
        if config.codec:
            self._ways = (Way(config.codec, config.codec_level), *self._plan(config))
            codecs.prepare(config.codec)

    @property
    def encodes(self) -> bool:
        """Whether chunks are encoded before they are stored."""
        return bool(self._ways)

    def way(self, codec: str, level: str) -> Way:
        """``codec`` at ``level``, checked; "" is no codec.

        Raises:
            ConfigError: the codec or the level is not there.
        """
        if not codec:
            return AS_IS
        levels = self._codecs.get(codec).info.levels
        if level and level not in levels:
            raise ConfigError(
                f"codec {codec} has no level {level!r}",
                op="codec",
                hint=f"levels are {', '.join(filter(None, levels))}",
            )
        self._codecs.prepare(codec)
        return Way(codec, level)

    def encode(
        self,
        payload: memoryview,
        slot: memoryview,
        *,
        key: bytes,
        layout: ChunkLayout,
        way: Way | None = None,
    ) -> int | None:
        """Encode ``payload`` into ``slot`` and seal it; its size in bytes as stored.

        Args:
            slot: writable, as long as the slot of the raw chunk.
            way: instead of the configured one; `AS_IS` is none.

        Returns:
            None when the chunk is to be stored as it is.
        """
        for each in (way, *self._fallbacks(way.codec)) if way else self._chosen(layout):
            if each == AS_IS:
                break
            nbytes = self._encode(each, payload, slot[HEADER_BYTES:], layout)
            if nbytes is None:
                continue
            envelope.seal(
                slot,
                key=key,
                layout=layout.encoded_fingerprint,
                payload_bytes=nbytes,
                codec=each.codec,
                raw_bytes=layout.payload_bytes,
            )
            self._count(f"encoded.{each.codec}", 1)
            return envelope.stored_bytes(nbytes)
        self._count("encoded.as_is", 1)
        return None

    def open(
        self, slot: memoryview, *, key: bytes, layout: ChunkLayout, nbytes: int, timeout_s: float
    ) -> Opened:
        """Verify the ``nbytes`` bytes that a store gave, and decode them in place.

        Args:
            slot: writable, as long as the slot of the raw chunk.
            timeout_s: how long to wait for a codec that is being compiled.
        """
        header = envelope.read_header(slot[:nbytes])
        if isinstance(header, Verdict):
            return Opened(Status.CORRUPT, header.value)
        meant = layout.encoded_fingerprint if header.codec else layout.fingerprint
        verdict = envelope.verify(
            slot, key=key, layout=meant, stored_bytes=nbytes, codec=header.codec
        )
        sizes = envelope.stored_bytes(header.payload_bytes), header.raw_bytes
        if verdict is Verdict.OK and sizes != (nbytes, layout.payload_bytes):
            verdict = Verdict.LENGTH
        if verdict is not Verdict.OK:
            return Opened(Status.CORRUPT, verdict.value)
        if not header.codec:
            return Opened(Status.OK)
        return self._decode(header.codec, slot, header.payload_bytes, layout, timeout_s)

    def _decode(
        self, name: str, slot: memoryview, nbytes: int, layout: ChunkLayout, timeout_s: float
    ) -> Opened:
        try:
            codec = self._codecs.ready(name, timeout_s)
        except ConfigError as error:
            self._say("codec_unknown", name, str(error))
            return Opened(Status.MISS, "codec")
        if codec is None:
            return Opened(Status.TIMED_OUT, "codec")
        body = slot[HEADER_BYTES:]
        # Encoded and decoded bytes share the slot, so the smaller of them moves out.
        source = self._borrow(nbytes)
        source[:] = body[:nbytes]
        start_s = time.thread_time()
        try:
            codec.decode_into(source.toreadonly(), body[: layout.payload_bytes], shape=layout.shape)
        except CannotDecode as error:
            self._say(f"codec_{error.reason}", name, str(error))
            if error.reason == "version":
                return Opened(Status.MISS, "codec")
            return Opened(Status.CORRUPT, "codec_stream")
        except Exception as error:  # the boundary to foreign code: counted, never lost
            # Its checksums are right: the chunk is not to blame, and stays.
            self._say("codec_failed", name, repr(error))
            return Opened(Status.MISS, "codec")
        self._count(f"decoded.{name}", 1)
        if self._chooser is not None:
            seconds = time.thread_time() - start_s
            for way in self._chooser_ways(name):
                self._chooser.decoded(way, layout.payload_bytes, seconds)
        return Opened(Status.OK, codec=name)

    def _encode(
        self, way: Way, payload: memoryview, target: memoryview, layout: ChunkLayout
    ) -> int | None:
        room = target[: max(0, layout.payload_bytes - _PAGE_BYTES)]
        start_s = time.thread_time()
        nbytes: int | None = None
        try:
            codec = self._codecs.ready(way.codec, PREPARE_LIMIT_S)
            if codec is None:
                self._say("codec_not_ready", way.codec, f"not within {PREPARE_LIMIT_S} s")
                return None
            start_s = time.thread_time()
            nbytes = self._checked(codec, payload, room, layout, way.level)
        except CannotEncode as error:
            self._say(f"codec_refused.{error.reason}", way.codec, str(error))
        except Exception as error:  # the boundary to foreign code: counted, never lost
            self._say("codec_failed", way.codec, str(error) or repr(error))
        if self._chooser is not None:
            seconds = time.thread_time() - start_s
            stored = layout.payload_bytes if nbytes is None else nbytes
            self._chooser.encoded(way, layout.payload_bytes, stored, seconds)
        return nbytes

    def _checked(
        self,
        codec: Codec,
        payload: memoryview,
        room: memoryview,
        layout: ChunkLayout,
        level: str,
    ) -> int:
        info = codec.info
        nbytes, error = codec.encode_into(payload, room, shape=layout.shape, level=level)
        if not 0 < nbytes <= len(room):
            raise CannotEncode("size", f"{nbytes} bytes in {len(room)}", codec=info.name)
        bound = info.max_error.get(level or info.default_level, 0.0)
        if not error <= bound:
            raise CannotEncode("bound", f"error {error:.4g} over {bound:.4g}", codec=info.name)
        return nbytes

    def _chosen(self, layout: ChunkLayout) -> tuple[Way, ...]:
        if self._chooser is None:
            return self._ways
        link = self.loads.bytes_per_s or self.stores.bytes_per_s
        tokens = self._config.ttft_target_tokens
        way = self._chooser.choose(link, layout.payload_bytes * tokens // layout.chunk_size)
        self._count(f"chosen.{way.codec or 'as_is'}{'-' + way.level if way.level else ''}", 1)
        return (way, *self._fallbacks(way.codec))

    def _plan(self, config: TierConfig) -> tuple[Way, ...]:
        """The ways after the configured one; sets up the choice of ``auto``."""
        info = self._codecs.get(config.codec).info
        fallbacks = self._fallbacks(config.codec)
        if config.codec_level == AUTO:
            levels = [Way(config.codec, level) for level in info.levels]
            target_s = config.ttft_target_s
            self._chooser = Chooser((AS_IS, *fallbacks, *levels), target_s=target_s)
        else:
            self.way(config.codec, config.codec_level)
        return fallbacks

    def _fallbacks(self, name: str) -> tuple[Way, ...]:
        if not name or self._codecs.get(name).info.lossless or LOSSLESS not in self._codecs.names():
            return ()
        try:
            self._codecs.prepare(LOSSLESS)
        except ConfigError:
            return ()
        return (Way(LOSSLESS, ""),)

    def _chooser_ways(self, name: str) -> list[Way]:
        return [Way(name, level) for level in self._codecs.get(name).info.levels]

    def _borrow(self, nbytes: int) -> memoryview:
        """Memory of this thread's own, kept for the next call."""
        held: bytearray = getattr(self._scratch, "held", bytearray())
        if len(held) < nbytes:
            held = self._scratch.held = bytearray(nbytes)
        return memoryview(held)[:nbytes]

    def _say(self, event: str, name: str, why: str) -> None:
        """Count it, and log it the first time."""
        self._count(f"{event}.{name}", 1)
        if (event, name) not in self._said:
            self._said.add((event, name))
            self._log.warn(event, codec=name, why=repr(why))
