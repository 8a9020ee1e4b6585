"""Chunks on their way to a tier and back: `lmcache_core.tiers.encoding`, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from lmcache_core import envelope
from lmcache_core.codecs.registry import Codecs
from lmcache_core.config import TierConfig
from lmcache_core.layout import ChunkLayout
from lmcache_core.quality.pages import pack, unpack
from lmcache_core.quality.plan import PREPARE_LIMIT_S, Choice
from lmcache_core.sdk import Status
from lmcache_core.tiers.encoding import Encoding

if TYPE_CHECKING:
    import torch

_KEY = b"quality-report"


@dataclass(slots=True)
class Passage:
    """Of every chunk with one codec and level.

    Attributes:
        raw_bytes, stored_bytes: of all payloads; of what a tier would store, the envelope's
            header and padding included.
        chunks, stored_otherwise: how many; how many of them another codec, or none, encoded.
        encode_s, decode_s: of each chunk.
        max_error: the largest of a layer of keys or values of one chunk, as
            `lmcache_core.sdk.Codec.encode_into` has it.
        lost, power: float64 ``[layers, 2]``: sums of squares of the differences, of the values.
    """

    choice: Choice
    layout: ChunkLayout
    codecs: Codecs
    raw_bytes: int = 0
    stored_bytes: int = 0
    chunks: int = 0
    stored_otherwise: int = 0
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    max_error: float = 0.0
    lost: torch.Tensor | None = None
    power: torch.Tensor | None = None
    _encoding: Encoding = field(init=False)
    _slot: memoryview = field(init=False)

    def __post_init__(self) -> None:
        codec, level = self.choice
        tier = TierConfig(url="memory:///", codec=codec, codec_level=level)
        self._encoding = Encoding(tier, self.codecs)
        self._slot = memoryview(bytearray(envelope.stored_bytes(self.layout.payload_bytes)))

    def context(self, kv: torch.Tensor) -> torch.Tensor:
        """What a context's keys and values are after they lay encoded on a tier.

        Args:
            kv: ``[layers, 2, context_tokens, heads, head_size]`` of the payload's dtype.
        """
        import torch

        parts = kv.split(self.layout.chunk_size, dim=2)
        return torch.cat([self.chunk(part) for part in parts], dim=2)

    def chunk(self, kv: torch.Tensor) -> torch.Tensor:
        """The same of one chunk."""
        payload = pack(kv, self.layout)
        back = self._through(memoryview(payload).toreadonly())
        self.chunks += 1
        self.raw_bytes += len(payload)
        found = unpack(back, self.layout)
        self._account(kv, found)
        return found

    def _through(self, payload: memoryview) -> memoryview:
        """Into the slot, and out of it; a view of the slot."""
        slot, layout = self._slot, self.layout
        start_s = time.perf_counter()
        stored = self._encoding.encode(payload, slot, key=_KEY, layout=layout)
        encoded_s = time.perf_counter()
        if stored is None:
            # A tier then stores the slot of the raw chunk.
            stored = envelope.stored_bytes(len(payload))
            slot[envelope.HEADER_BYTES :][: len(payload)] = payload
            envelope.seal(slot, key=_KEY, layout=layout.fingerprint, payload_bytes=len(payload))
        opening_s = time.perf_counter()
        opened = self._encoding.open(
            slot, key=_KEY, layout=layout, nbytes=stored, timeout_s=PREPARE_LIMIT_S
        )
        opened_s = time.perf_counter()
        if opened.status is not Status.OK:
            raise RuntimeError(f"a chunk of {self.choice} does not come back: {opened.why}")
        self.stored_bytes += stored
        self.stored_otherwise += opened.codec != self.choice.codec
        self.encode_s.append(encoded_s - start_s)
        self.decode_s.append(opened_s - opening_s)
        return slot[envelope.HEADER_BYTES :][: len(payload)]

    def _account(self, raw: torch.Tensor, found: torch.Tensor) -> None:
        import torch

        raw, found = raw.to(torch.float32), found.to(torch.float32)
        power = raw.square().sum((2, 3, 4), dtype=torch.float64)
        lost = (raw - found).square().sum((2, 3, 4), dtype=torch.float64)
        self.max_error = max(self.max_error, float(_relative(lost, power).max()))
        self.power = power if self.power is None else self.power + power
        self.lost = lost if self.lost is None else self.lost + lost

    @property
    def ratio(self) -> float:
        """Bytes of payload for each byte that a tier stores."""
        return self.raw_bytes / self.stored_bytes

    def bytes_per_s(self, seconds: list[float]) -> float:
        """Of payload, at the median of ``seconds``."""
        return self.layout.payload_bytes / median(seconds)

    def layer_errors(self) -> tuple[list[float], list[float]]:
        """Of keys and of values, for each layer: root mean square of the differences, divided by
        that of the values, over all chunks."""
        assert self.lost is not None and self.power is not None
        keys, values = _relative(self.lost, self.power).unbind(1)
        return keys.tolist(), values.tolist()


def _relative(lost: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    import torch

    share: torch.Tensor = (lost / power.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return share
