"""Where the bytes of a chunk lie: kinds of chunks, groups of layers, parts of workers.  Pure.

The model's layers form groups (vLLM's KV cache groups), each with its own block table.  Groups
whose attention reads everything before a token go into one kind of chunk; groups that only read
a window go into a second kind, of which a hit needs the last few chunks alone.  A model of one
sort has one kind.  The slot of a chunk holds every worker's part, so all ranks share one key,
and a chunk is there whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache_core.keys import key_suffix
from lmcache_core.layout import ChunkLayout
from lmcache_core.sdk import ELEMENT_BYTES, KVTensor, PayloadShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PageAxes:
    """Where keys and values lie in a page, in elements of ``dtype``: a page is two arrays.

    Attributes:
        dtype: as in `lmcache_core.sdk.ELEMENT_BYTES`; "" where it is none of these.
        heads, head_size: of both arrays; 0 where the axes are not known.
        starts: of the keys and of the values in the page.
        strides: of the keys and of the values, over (token, head, head_size).
    """

    dtype: str = ""
    heads: int = 0
    head_size: int = 0
    starts: tuple[int, int] = (0, 0)
    strides: tuple[tuple[int, int, int], tuple[int, int, int]] = ((0, 0, 0), (0, 0, 0))

    @classmethod
    def keys_transposed(cls, dtype: str, *, tokens: int, heads: int, head_size: int) -> PageAxes:
        """For each head the keys as [head_size, tokens], then the values as [tokens, head_size]:
        vLLM's CPU pages."""
        head = 2 * tokens * head_size
        return cls(
            dtype=dtype,
            heads=heads,
            head_size=head_size,
            starts=(0, tokens * head_size),
            strides=((1, head, tokens), (head_size, head, 1)),
        )

    @classmethod
    def rows(
        cls, dtype: str, *, tokens: int, heads: int, head_size: int, tokens_inside: bool
    ) -> PageAxes:
        """For each token and head the key, then the value, heads outside of tokens or inside:
        FlashAttention's pages."""
        row = 2 * head_size
        token, head = (row, tokens * row) if tokens_inside else (heads * row, row)
        return cls(
            dtype=dtype,
            heads=heads,
            head_size=head_size,
            starts=(0, head_size),
            strides=((token, head, 1), (token, head, 1)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that share a block table.

    Attributes:
        index: of the group in vLLM's configuration.
        layers: of the worker that has most of them.
        block_size: tokens in a block.
        page_bytes: of one block in one layer.
        window: how many tokens before a position its attention needs; None for all.
        chunk_blocks: blocks in a chunk.
        stored_blocks: how many of them are stored, the last ones.
        axes: what is known of its pages.
    """

    index: int
    layers: int
    block_size: int
    page_bytes: int
    window: int | None
    chunk_blocks: int
    stored_blocks: int
    axes: PageAxes = field(default=PageAxes(), repr=False)

    @classmethod
    def of(
        cls,
        *,
        index: int,
        layers: int,
        block_size: int,
        page_bytes: int,
        window: int | None,
        chunk_size: int,
        axes: PageAxes = PageAxes(),
    ) -> Group:
        """Of a window only the blocks that a hit at the chunk's end needs are stored."""
        blocks = chunk_size // block_size
        stored = blocks if window is None else min(blocks, max(1, -(-window // block_size)))
        return cls(
            index=index,
            layers=layers,
            block_size=block_size,
            page_bytes=page_bytes,
            window=window,
            chunk_blocks=blocks,
            stored_blocks=stored,
            axes=axes,
        )

    def tensors(self, offset_bytes: int) -> tuple[KVTensor, ...]:
        """Keys and values of one worker's part that starts there; empty where the axes are not
        known."""
        axes = self.axes
        if not axes.heads:
            return ()
        size = ELEMENT_BYTES[axes.dtype]
        outer = (self.stored_blocks * self.page_bytes, self.page_bytes)
        shape = (self.layers, self.stored_blocks, self.block_size, axes.heads, axes.head_size)
        return tuple(
            KVTensor(
                role=role,
                offset_bytes=offset_bytes + start * size,
                shape=shape,
                strides_bytes=(*outer, token * size, head * size, channel * size),
            )
            for role, start, (token, head, channel) in zip(
                ("key", "value"), axes.starts, axes.strides
            )
        )

    @property
    def part_bytes(self) -> int:
        """Of one worker in a chunk: ``[layers, stored_blocks, page_bytes]``."""
        return self.layers * self.stored_blocks * self.page_bytes

    def stored_range(self, chunk: int) -> range:
        """Indices in the request's block table of what chunk number ``chunk`` stores."""
        end = (chunk + 1) * self.chunk_blocks
        return range(end - self.stored_blocks, end)


@dataclass(frozen=True, slots=True)
class Kind:
    """Chunks of one layout.

    Attributes:
        groups: whose pages they hold.
        layout: of the whole slot.
        offsets: where each group's bytes start in the payload.
        suffix: last 6 bytes of their keys.
    """

    groups: tuple[Group, ...]
    layout: ChunkLayout
    offsets: tuple[int, ...]
    suffix: bytes


@dataclass(frozen=True, slots=True)
class Geometry:
    """Of one engine.

    Attributes:
        chunk_size: tokens in a chunk.
        hit_step: a hit is a multiple of so many tokens.
        parts: workers whose bytes differ.
        workers: all of them; consecutive ones may hold copies (latents of MLA).
        padded: some worker has fewer layers than its part has room for.
        decode_only: the attention backend can't prefill behind tokens that were loaded, so a
            hit must leave one token, which it decodes.
        kinds: the first is needed from the start of a prefix; the second, of models that mix
            windows with full attention, only for the window before a hit's end.
    """

    chunk_size: int
    hit_step: int
    parts: int
    workers: int
    padded: bool
    decode_only: bool
    kinds: tuple[Kind, ...]

    @classmethod
    def of(
        cls,
        groups: list[Group],
        *,
        chunk_size: int,
        hit_step: int,
        parts: int,
        workers: int,
        padded: bool = False,
        decode_only: bool = False,
        description: bytes,
    ) -> Geometry:
        """Sort ``groups`` into kinds.  ``description`` says how the bytes of a page are laid
        out."""
        full = tuple(group for group in groups if group.window is None)
        windowed = tuple(group for group in groups if group.window is not None)
        kinds = []
        for number, members in enumerate(sort for sort in (full, windowed) if sort):
            offsets = []
            nbytes = 0
            for group in members:
                offsets.append(nbytes)
                nbytes += parts * group.part_bytes
            layout = ChunkLayout(
                chunk_size=chunk_size,
                payload_bytes=nbytes,
                description=b"%d parts, %r, " % (parts, members) + description,
                shape=_shape(members, offsets, nbytes, parts),
            )
            kinds.append(Kind(members, layout, tuple(offsets), key_suffix(0, number)))
        if windowed:
            # In the middle of a chunk a hit would need blocks that are not stored.
            hit_step = chunk_size
        return cls(chunk_size, hit_step, parts, workers, padded, decode_only, tuple(kinds))

    @property
    def groups(self) -> tuple[Group, ...]:
        """Every group, by kind."""
        return tuple(group for kind in self.kinds for group in kind.groups)

    @property
    def slot_bytes(self) -> int:
        """Payload of a chunk of every kind."""
        return sum(kind.layout.payload_bytes for kind in self.kinds)

    def tail_start(self, chunks: int) -> int:
        """First chunk whose second kind a hit of ``chunks`` chunks needs."""
        window = max(group.window or 0 for group in self.kinds[1].groups)
        return max(0, chunks * self.chunk_size - window) // self.chunk_size

    def key(self, digest_key: bytes, kind: int) -> bytes:
        """The key of the same chunk of another kind."""
        return digest_key[: -len(self.kinds[kind].suffix)] + self.kinds[kind].suffix


def _shape(groups: tuple[Group, ...], offsets: list[int], nbytes: int, parts: int) -> PayloadShape:
    dtypes = {group.axes.dtype for group in groups}
    dtype = dtypes.pop() if len(dtypes) == 1 else ""
    found = [
        group.tensors(offset + part * group.part_bytes)
        for group, offset in zip(groups, offsets)
        for part in range(parts)
    ]
    known = bool(dtype) and all(found)
    tensors = tuple(tensor for each in found for tensor in each) if known else ()
    return PayloadShape(nbytes=nbytes, dtype=dtype, tensors=tensors)
