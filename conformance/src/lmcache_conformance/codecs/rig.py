"""What a codec is judged with: guarded buffers, and errors that are told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lmcache_conformance.codecs.payloads import Sample, samples
from lmcache_conformance.frame import Wrong
from lmcache_core.sdk import CannotDecode, CannotEncode, Codec, Encoded, PayloadShape

GUARD = 4096
_FILL = 0xA5


class Guarded:
    """Writable memory between two guards."""

    def __init__(self, nbytes: int) -> None:
        self._memory = bytearray([_FILL]) * (nbytes + 2 * GUARD)
        self.view = memoryview(self._memory)[GUARD : GUARD + nbytes]

    @property
    def intact(self) -> bool:
        """Whether nobody wrote outside."""
        guard = bytes([_FILL]) * GUARD
        return self._memory[:GUARD] == guard and self._memory[-GUARD:] == guard


class CodecRig:
    """One codec under judgement.

    Attributes:
        seed: of everything random.
        figures: what a check measured.
    """

    def __init__(self, codec: Codec, *, seed: int) -> None:
        self.codec = codec
        self.seed = seed
        self.figures: dict[str, float] = {}
        self.rng = np.random.default_rng(seed)

    def finish(self) -> list[str]:
        """Nothing is left behind."""
        return []

    @property
    def levels(self) -> Sequence[str]:
        """As declared."""
        return self.codec.info.levels

    def samples(self) -> list[Sample]:
        """Every payload, the same for each seed."""
        return list(samples(np.random.default_rng(self.seed)))

    def encode(
        self, sample: Sample, level: str = "", room: int | None = None
    ) -> tuple[bytes, Encoded] | CannotEncode:
        """The stream and what was said of it, or the refusal.

        Raises:
            Wrong: it wrote outside of its target, changed its source, kept a buffer, or raised
                anything else.
        """
        target = Guarded(2 * len(sample.payload) + 8192 if room is None else room)
        source = memoryview(bytearray(sample.payload)).toreadonly()
        try:
            said = self.codec.encode_into(source, target.view, shape=sample.shape, level=level)
        except CannotEncode as refusal:
            said = None
            refused = refusal
        except Exception as error:
            raise Wrong(f"{sample.name}: encode raised {error!r}") from error
        if not target.intact:
            raise Wrong(f"{sample.name}: encode wrote outside of its target")
        if bytes(source) != sample.payload:
            raise Wrong(f"{sample.name}: encode changed its source")
        if said is None:
            return refused
        if not 0 < said.nbytes <= len(target.view):
            raise Wrong(f"{sample.name}: {said.nbytes} bytes in {len(target.view)}")
        return bytes(target.view[: said.nbytes]), said

    def decode(
        self, stream: bytes, shape: PayloadShape, name: str = "a stream"
    ) -> bytes | CannotDecode:
        """What it decodes to, or the refusal.

        Raises:
            Wrong: it wrote outside of its target, or raised anything else.
        """
        target = Guarded(shape.nbytes)
        source = memoryview(bytearray(stream)).toreadonly()
        refused = None
        try:
            self.codec.decode_into(source, target.view, shape=shape)
        except CannotDecode as refusal:
            refused = refusal
        except Exception as error:
            raise Wrong(f"{name}: decode raised {error!r}, not CannotDecode") from error
        if not target.intact:
            raise Wrong(f"{name}: decode wrote outside of its target")
        return bytes(target.view) if refused is None else refused

    def taken(self, level: str = "") -> Iterator[tuple[Sample, bytes, Encoded]]:
        """Every sample that the codec takes, its stream, and what was said of it."""
        for sample in self.samples():
            encoded = self.encode(sample, level)
            if not isinstance(encoded, CannotEncode):
                yield (sample, *encoded)

    def streams(self, level: str = "") -> list[tuple[Sample, bytes]]:
        """Every sample that the codec takes, encoded.

        Raises:
            Wrong: it takes none.
        """
        found = [(sample, stream) for sample, stream, _ in self.taken(level)]
        if not found:
            raise Wrong("it takes none of the payloads")
        return found
