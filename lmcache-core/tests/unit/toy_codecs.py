"""Small codecs for tests of the code around codecs, and the registry that holds them."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

from lmcache_core.codecs.registry import Codecs
from lmcache_core.sdk import CannotDecode, CannotEncode, Codec, CodecInfo, Encoded, PayloadShape

_VERSION = b"1"


class Toy(Codec):
    """zlib behind one byte of version; what it does next can be scripted."""

    info = CodecInfo(name="toy", version=1, lossless=True)

    def __init__(self) -> None:
        self.refuses: str = ""
        self.raises: Exception | None = None
        self.writes = _VERSION
        self.prepared = threading.Event()
        self.prepared.set()
        self.levels: list[str] = []
        self.decoded = 0

    def prepare(self) -> None:
        self.prepared.wait(20)

    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        assert source.readonly and len(source) == shape.nbytes
        self.levels.append(level)
        if self.raises:
            raise self.raises
        if self.refuses:
            raise CannotEncode(self.refuses, codec=self.info.name)
        stream = self.writes + zlib.compress(source, 1)
        if len(stream) > len(target):
            raise CannotEncode("size", codec=self.info.name)
        target[: len(stream)] = stream
        return Encoded(len(stream))

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        if self.raises:
            raise self.raises
        if source[:1] != _VERSION:
            raise CannotDecode("version", codec=self.info.name)
        try:
            target[:] = zlib.decompress(source[1:])
        except (zlib.error, ValueError) as error:
            raise CannotDecode("stream", str(error), codec=self.info.name) from error
        self.decoded += 1


class Lossless(Toy):
    """Under the name of the codec that lossy ones give way to."""

    info = CodecInfo(name="zstd", version=1, lossless=True)


class Rounding(Toy):
    """A lossy one of three levels: clears low bits, and says how large its error is."""

    info = CodecInfo(
        name="rounding",
        version=1,
        lossless=False,
        levels=("low", "high"),
        default_level="low",
        max_error={"low": 0.1, "high": 0.2},
    )

    def __init__(self) -> None:
        super().__init__()
        self.error = 0.05

    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        mask = 0xF0 if level == "high" else 0xFE
        rounded = bytes(value & mask for value in source)
        done = super().encode_into(
            memoryview(rounded).toreadonly(), target, shape=shape, level=level
        )
        return Encoded(done.nbytes, self.error)


def holding(*made: Codec | tuple[str, Callable[[], Any]]) -> Codecs:
    """A registry of these codecs, by their names."""

    class Entry:
        dist = None

        def __init__(self, name: str, make: Callable[[], Any]) -> None:
            self.name = name
            self._make = make

        def load(self) -> Callable[[], Any]:
            return self._make

    entries: list[Any] = []
    for each in made:
        if isinstance(each, tuple):
            entries.append(Entry(*each))
        else:
            entries.append(Entry(each.info.name, lambda each=each: each))
    found: list[metadata.EntryPoint] = entries
    return Codecs(lambda: found)
