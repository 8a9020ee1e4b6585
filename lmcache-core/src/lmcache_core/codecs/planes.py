"""Where the planes of a payload are, and what is known of each beside its symbols.

numpy alone; the kernels over it are in `lattice`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcache_core.codecs.scratch import scratch
from lmcache_core.sdk.codec import KVTensor, PayloadShape

CHANNEL_COLUMNS = 5
"""Symbols of a channel: step, class, gain, centre (zigzag, low and high byte)."""
TOKEN_COLUMNS = 2
"""Symbols of a token in a plane: shift, move."""


class Part(NamedTuple):
    """One tensor: which of all layers, elements, channels, tokens and planes are its own."""

    tensor: KVTensor
    geometry: NDArray[np.int64]
    first_layer: int
    first_element: int
    first_channel: int
    first_token: int
    first_plane: int

    @property
    def layers(self) -> int:
        return self.tensor.shape[0]

    @property
    def tokens(self) -> int:
        return self.tensor.shape[1] * self.tensor.shape[2]

    @property
    def channels(self) -> int:
        return self.tensor.shape[3] * self.tensor.shape[4]

    def symbols(self, flat: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """``[layers, tokens, channels]`` of all elements."""
        part = flat[self.first_element : self.first_element + self.tensor.elements]
        return part.reshape(self.layers, self.tokens, self.channels)

    def of_channels(self, flat: NDArray[Any]) -> NDArray[Any]:
        """``[layers, channels]`` of those of all planes."""
        part = flat[self.first_channel : self.first_channel + self.layers * self.channels]
        return part.reshape(self.layers, self.channels)

    def of_tokens(self, flat: NDArray[Any]) -> NDArray[Any]:
        """``[layers, tokens]`` of those of all planes."""
        part = flat[self.first_token : self.first_token + self.layers * self.tokens]
        return part.reshape(self.layers, self.tokens)


class Planes:
    """All planes of a payload, with side arrays that are its thread's until the next call.

    Attributes:
        step, classes, gain, centre: of channels of planes, one after the other.
        shift, move: of tokens of planes.
        count: of planes.
        layers: role -> how many layers have it.
    """

    def __init__(self, shape: PayloadShape) -> None:
        self.parts: list[Part] = []
        self.layers = {"key": 0, "value": 0}
        element = channel = token = self.count = 0
        words = max(shape.element_bytes // 2, 1)
        for tensor in shape.tensors:
            strides = [stride // shape.element_bytes * words for stride in tensor.strides_bytes]
            geometry = np.array([tensor.offset_bytes // 2, *tensor.shape, *strides], np.int64)
            part = Part(
                tensor, geometry, self.layers[tensor.role], element, channel, token, self.count
            )
            self.parts.append(part)
            self.layers[tensor.role] += part.layers
            element += tensor.elements
            channel += part.layers * part.channels
            token += part.layers * part.tokens
            self.count += part.layers
        self.elements = element
        self.step, self.classes, self.gain = (
            scratch(use, (channel,), np.uint8) for use in ("step", "classes", "gain")
        )
        self.centre = scratch("centre", (channel,), np.int16)
        self.shift, self.move = (scratch(use, (token,), np.uint8) for use in ("shift", "move"))

    def values_first(self) -> list[Part]:
        """Parts in the order of encoding."""
        return sorted(self.parts, key=lambda part: part.tensor.role == "key")

    def copy_shift(self, part: Part) -> bool:
        """Give keys the shifts of their layers' values; False where they can't have them."""
        if part.tensor.role != "key":
            return False
        rows = [
            row
            for other in self.parts
            if other.tensor.role == "value" and other.tokens == part.tokens
            for row in other.of_tokens(self.shift)
        ]
        if len(rows) != self.layers["key"] or len(rows) != self.layers["value"]:
            return False
        own = rows[part.first_layer : part.first_layer + part.layers]
        part.of_tokens(self.shift)[:] = own
        return True

    def channel_symbols(self) -> NDArray[np.uint8]:
        """``[channels, CHANNEL_COLUMNS]``."""
        wide = self.centre.astype(np.int32)
        zigzag = (wide << 1) ^ (wide >> 31)
        columns = (self.step, self.classes, self.gain, zigzag & 0xFF, zigzag >> 8)
        return np.stack([column.astype(np.uint8) for column in columns], axis=1)

    def token_symbols(self) -> NDArray[np.uint8]:
        """``[tokens, TOKEN_COLUMNS]``."""
        return np.stack((self.shift, self.move), axis=1)

    def take_channels(self, symbols: NDArray[np.uint8]) -> None:
        """The reverse of `channel_symbols`."""
        self.step[:], self.classes[:], self.gain[:] = symbols[:, 0], symbols[:, 1], symbols[:, 2]
        zigzag = symbols[:, 3].astype(np.int32) | symbols[:, 4].astype(np.int32) << 8
        self.centre[:] = (zigzag >> 1) ^ -(zigzag & 1)

    def take_tokens(self, symbols: NDArray[np.uint8]) -> None:
        """The reverse of `token_symbols`."""
        self.shift[:], self.move[:] = symbols[:, 0], symbols[:, 1]
