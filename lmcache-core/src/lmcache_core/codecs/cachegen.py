"""`cachegen`: lossy, after CacheGen (Liu et al., SIGCOMM 2024, arXiv:2310.07240).

As there: keys and values are coded as differences along tokens, with steps that depend on the
group of layers, an anchor token that is kept finer, and an entropy coder with statistics of
channels.  Different here, because a chunk has a few hundred tokens: a token is guessed from the
one before it and the channel's centre, in integers; a channel chooses one of few shared tables.
"""

from __future__ import annotations

import math
import threading
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcache_core.codecs import stream
from lmcache_core.codecs.extras import require
from lmcache_core.codecs.levels import LEVELS, Level, coarseness
from lmcache_core.codecs.planes import CHANNEL_COLUMNS, TOKEN_COLUMNS, Part, Planes
from lmcache_core.codecs.scratch import scratch
from lmcache_core.sdk.codec import (
    CannotDecode,
    CannotEncode,
    Codec,
    CodecInfo,
    Encoded,
    PayloadShape,
)
from lmcache_core.sdk.errors import ConfigError, ContractViolation

_KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
_OCTAVE = (1.0, 1.189207115, 1.414213562, 1.681792831)
_STEPS = np.array([math.ldexp(_OCTAVE[i % 4], i // 4 - 32) for i in range(256)], np.float32)
"""Steps of channels: four to an octave, 1.0 at 128."""
_PATCHES_SHARE = 64
"""At most one element of so many is a patch."""
_MOST_BYTES = 2 << 30
"""A patch has 32 bits for its place."""
_SIDE_RUNS = 2
"""Runs before those of planes: symbols of channels, of tokens."""


class _Kernels(NamedTuple):
    lattice: ModuleType
    rans: ModuleType


class CacheGen(Codec):
    """Lossy; see the module.  Thread-safe: a call's memory is its thread's own."""

    info = CodecInfo(
        name=stream.NAME,
        version=stream.VERSION,
        lossless=False,
        needs_axes=True,
        levels=tuple(LEVELS),
        default_level="low",
        max_error={name: level.max_error for name, level in LEVELS.items()},
    )

    def __init__(self) -> None:
        require("numba", stream.NAME)
        self._kernels: _Kernels | None = None
        self._lock = threading.Lock()

    def prepare(self) -> None:
        self._compiled()

    def _compiled(self) -> _Kernels:
        with self._lock:
            if self._kernels is None:
                try:
                    from lmcache_core.codecs import lattice, rans
                except ImportError as error:
                    raise ConfigError(
                        f"codec cachegen needs numba: {error}",
                        backend=stream.NAME,
                        op="prepare",
                        hint="pip install 'lmcache-core[cachegen]'",
                    ) from error
                self._kernels = _Kernels(lattice, rans)
            return self._kernels

    def encode_into(
        self, source: memoryview, target: memoryview, *, shape: PayloadShape, level: str = ""
    ) -> Encoded:
        name = level or self.info.default_level
        if name not in LEVELS:
            raise ContractViolation(f"no level {level!r}", backend=stream.NAME, op="encode")
        _check_length(source, shape, "encode")
        if not shape.nbytes:
            raise CannotEncode("size", "nothing to encode", codec=stream.NAME)
        if not shape.tensors:
            raise CannotEncode("axes", "the payload's axes are not known", codec=stream.NAME)
        if shape.nbytes > _MOST_BYTES:
            raise CannotEncode("size", f"over {_MOST_BYTES} bytes", codec=stream.NAME)
        encoder = _Encoder(self._compiled(), shape, LEVELS[name])
        error = encoder.quantise(_words_of(source))
        if error > LEVELS[name].max_error:
            raise CannotEncode("bound", f"error {error:.3g} at {name}", codec=stream.NAME)
        room = min(len(target), shape.nbytes - 1)
        return Encoded(encoder.write(target[:room], list(LEVELS).index(name)), error)

    def decode_into(self, source: memoryview, target: memoryview, *, shape: PayloadShape) -> None:
        _check_length(target, shape, "decode")
        if not shape.tensors:
            raise _damaged("the payload's axes are not known")
        _Decoder(self._compiled(), shape).run(source, target)


class _Encoder:
    """One call of `CacheGen.encode_into`."""

    def __init__(self, kernels: _Kernels, shape: PayloadShape, level: Level) -> None:
        self._lattice, self._rans = kernels
        self._level = level
        self._kind = _KINDS[shape.dtype]
        self._planes = Planes(shape)
        elements = self._planes.elements
        self._symbols = scratch("symbols", (elements,), np.uint8)
        self._patches = scratch("patches", (elements // _PATCHES_SHARE + 1, 2), np.int32)
        self._patched = 0
        tables = self._lattice.TABLES + CHANNEL_COLUMNS + TOKEN_COLUMNS
        self._histogram = np.zeros((tables, stream.SYMBOLS), np.int64)

    def quantise(self, words: NDArray[np.uint16]) -> float:
        """Symbols, sides and histogram of all planes; the largest error."""
        worst = 0.0
        for part in self._planes.values_first():
            worst = max(worst, self._quantise_part(words, part))
        return worst

    def _quantise_part(self, words: NDArray[np.uint16], part: Part) -> float:
        planes, role = self._planes, part.tensor.role
        coarse = [
            coarseness(self._level, role, part.first_layer + layer, planes.layers[role])
            for layer in range(part.layers)
        ]
        sums = np.zeros((part.layers, 2))
        self._patched = self._lattice.to_symbols(
            words, part.geometry, self._kind, np.array(coarse), self._level.power,
            not planes.copy_shift(part), _STEPS, part.symbols(self._symbols),
            part.of_channels(planes.step), part.of_channels(planes.centre),
            part.of_channels(planes.gain), part.of_channels(planes.classes),
            part.of_tokens(planes.shift), part.of_tokens(planes.move), self._histogram,
            part.first_element, self._patches, self._patched, sums,
            scratch("plane", (part.tokens, part.channels), np.float32),
        )  # fmt: skip
        if self._patched == self._lattice.NOT_FINITE:
            raise CannotEncode("nonfinite", codec=stream.NAME)
        if self._patched < 0:
            raise CannotEncode("size", "too many outliers", codec=stream.NAME)
        return _relative_error(sums)

    def write(self, target: memoryview, level: int) -> int:
        """Length of the stream in ``target``."""
        planes = self._planes
        channels, tokens = planes.channel_symbols(), planes.token_symbols()
        first = self._lattice.TABLES
        for side in (channels, tokens):
            for column in side.T:
                self._histogram[first] = np.bincount(column, minlength=stream.SYMBOLS)
                first += 1
        table = np.zeros(self._histogram.shape, np.uint16)
        self._rans.frequencies(self._histogram, table)
        coder = _WordsBefore(self._rans, table, len(target) // 2)
        for part in reversed(planes.parts):
            moves = planes.move + 3 * planes.shift
            coder.add(
                part.symbols(self._symbols), part.of_channels(planes.classes),
                part.of_tokens(moves),
            )  # fmt: skip
        channel_tables, token_tables = _side_tables(self._lattice.TABLES)
        coder.add(tokens[None], token_tables, _no_moves(tokens))
        coder.add(channels[None], channel_tables, _no_moves(channels))
        words, ends = coder.finish()
        patches = self._patches[: self._patched].astype(np.int64)
        patches = patches[np.argsort(patches[:, 0])]
        nbytes = stream.write(
            stream.Parts(level, self._kind, planes.elements, ends, patches, table, words), target
        )
        if nbytes < 0:
            raise CannotEncode("size", codec=stream.NAME)
        return nbytes


class _WordsBefore:
    """Runs of words that are written from the last to the first, as rANS does."""

    def __init__(self, rans: ModuleType, table: NDArray[np.uint16], most: int) -> None:
        self._rans = rans
        self._factor = np.empty(table.size, np.uint64)
        self._entry = np.empty(table.size, np.uint32)
        rans.encoder_tables(table, self._factor, self._entry)
        self._words = scratch("words", (most,), np.uint16)
        self._at = most
        self._starts: list[NDArray[np.int64]] = []

    def add(
        self, symbols: NDArray[np.uint8], tables: NDArray[np.uint8], moves: NDArray[np.uint8]
    ) -> None:
        """Runs of ``[planes, tokens, channels]`` before those that are there."""
        starts = np.empty(len(symbols), np.int64)
        self._at = self._rans.encode(
            symbols, tables, moves, self._factor, self._entry, self._words, self._at, starts
        )
        if self._at < 0:
            raise CannotEncode("size", codec=stream.NAME)
        self._starts.insert(0, starts)

    def finish(self) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """All words, and where each run ends."""
        starts = np.concatenate((*self._starts, [len(self._words)]))
        return self._words[self._at :], starts[1:] - self._at


class _Decoder:
    """One call of `CacheGen.decode_into`."""

    def __init__(self, kernels: _Kernels, shape: PayloadShape) -> None:
        self._lattice, self._rans = kernels
        self._kind = _KINDS[shape.dtype]
        self._planes = Planes(shape)

    def run(self, source: memoryview, target: memoryview) -> None:
        planes, lattice, rans = self._planes, self._lattice, self._rans
        parts = stream.read(
            source,
            kind=self._kind,
            elements=planes.elements,
            runs=_SIDE_RUNS + planes.count,
            tables=lattice.TABLES + CHANNEL_COLUMNS + TOKEN_COLUMNS,
            spare=rans.LANES,
            room=scratch("words", (len(source) // 2 + rans.LANES,), np.uint16),
        )
        entry = scratch("entry", (len(parts.table) * rans.TOTAL,), np.uint32)
        rans.decoder_tables(parts.table, entry)
        starts = np.concatenate((np.zeros(1, np.int64), parts.ends))
        self._read_sides(parts.words, starts, entry)
        moves = planes.move + 3 * planes.shift
        symbols = scratch("symbols", (planes.elements,), np.uint8)
        words, copied = _writable_words_of(target)
        for part in planes.parts:
            first = _SIDE_RUNS + part.first_plane
            self._read_runs(
                parts.words, starts[first : first + part.layers + 1],
                part.of_channels(planes.classes), part.of_tokens(moves), entry,
                part.symbols(symbols),
            )  # fmt: skip
            lattice.from_symbols(
                words, part.geometry, self._kind, _STEPS, part.symbols(symbols),
                part.of_channels(planes.step), part.of_channels(planes.centre),
                part.of_channels(planes.gain), part.of_tokens(planes.shift), part.first_element,
                parts.patches, scratch("plane", (part.tokens, part.channels), np.float32),
            )  # fmt: skip
        if copied:
            np.copyto(np.frombuffer(target, np.uint8), words.view(np.uint8))

    def _read_sides(
        self, words: NDArray[np.uint16], starts: NDArray[np.int64], entry: NDArray[np.uint32]
    ) -> None:
        planes, lattice = self._planes, self._lattice
        channels = np.empty((len(planes.step), CHANNEL_COLUMNS), np.uint8)
        tokens = np.empty((len(planes.shift), TOKEN_COLUMNS), np.uint8)
        tables = _side_tables(lattice.TABLES)
        for i, side in enumerate((channels, tokens)):
            self._read_runs(words, starts[i : i + 2], tables[i], _no_moves(side), entry, side[None])
        planes.take_channels(channels)
        planes.take_tokens(tokens)
        # Below, these are places in tables and numbers of bits.
        if planes.classes.max() >= lattice.CLASSES or planes.gain.max() > 7:
            raise _damaged("a channel's side is damaged")
        if planes.shift.max() > lattice.FINEST or planes.move.max() > 2 * lattice.SPREAD:
            raise _damaged("a token's side is damaged")

    def _read_runs(
        self, words: NDArray[np.uint16], starts: NDArray[np.int64], tables: NDArray[np.uint8],
        moves: NDArray[np.uint8], entry: NDArray[np.uint32], symbols: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        if self._rans.decode(words, starts, tables, moves, entry, symbols) < 0:
            raise _damaged("a run is damaged")


def _side_tables(first: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Tables of the columns of both sides."""
    tables = np.arange(first, first + CHANNEL_COLUMNS + TOKEN_COLUMNS, dtype=np.uint8)[None]
    return tables[:, :CHANNEL_COLUMNS].copy(), tables[:, CHANNEL_COLUMNS:].copy()


def _no_moves(side: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.zeros((1, len(side)), np.uint8)


def _relative_error(sums: NDArray[np.float64]) -> float:
    """Largest of layers, from sums of squares ``[layers, 2]`` of errors and values."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(sums[:, 0] > 0, sums[:, 0] / sums[:, 1], 0.0)
    return math.sqrt(float(share.max()))


def _check_length(payload: memoryview, shape: PayloadShape, op: str) -> None:
    if payload.nbytes != shape.nbytes:
        raise ContractViolation(
            f"payload of {payload.nbytes} bytes for a shape of {shape.nbytes}",
            backend=stream.NAME,
            op=op,
        )


def _words_of(payload: memoryview) -> NDArray[np.uint16]:
    words = np.frombuffer(payload, np.uint16)
    return words if words.flags.aligned else words.copy()


def _writable_words_of(payload: memoryview) -> tuple[NDArray[np.uint16], bool]:
    """The payload, or scratch of its length that is to be copied into it."""
    words = np.frombuffer(payload, np.uint16)
    if words.flags.aligned:
        return words, False
    return scratch("payload", words.shape, np.uint16), True


def _damaged(message: str) -> CannotDecode:
    return CannotDecode("stream", message, codec=stream.NAME)
