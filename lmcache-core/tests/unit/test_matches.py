"""How far a prefix goes when a model has two kinds of chunks: against the plain definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.cache import EmbeddedCache, Wanted
from lmcache_core.chunks import ChunkEngine
from lmcache_core.config import EngineConfig
from lmcache_core.integrations.vllm.geometry import Geometry, Group
from lmcache_core.integrations.vllm.matches import Match
from lmcache_core.keys import stored_key
from lmcache_core.memory.arena import Arena

CHUNK, BLOCK = 64, 16


def group(index: int, window: int | None) -> Group:
    return Group.of(
        index=index, layers=1, block_size=BLOCK, page_bytes=64, window=window, chunk_size=CHUNK
    )


def geometry(window: int) -> Geometry:
    return Geometry.of(
        [group(0, None), group(1, window)],
        chunk_size=CHUNK,
        hit_step=BLOCK,
        parts=1,
        workers=1,
        description=b"test",
    )


def keys(count: int) -> list[bytes]:
    return [stored_key(b"namespac", bytes([i]) * 32) for i in range(count)]


@pytest.fixture(scope="module")
def engine() -> Iterator[ChunkEngine]:
    config = EngineConfig(host_bytes=4 << 20)
    arena = Arena.create(config.host_bytes, prefault=False, warn=print)
    made = ChunkEngine(config=config, arena=arena)
    yield made
    made.close()


def longest(full: set[int], windowed: set[int], shape: Geometry, first: int, count: int) -> int:
    """The definition: every chunk of the first kind, and the window before the end."""
    for end in range(count, first, -1):
        start = max(shape.tail_start(end), first)
        if set(range(first, end)) <= full and set(range(start, end)) <= windowed:
            return end
    return first


@settings(max_examples=300, deadline=None)
@given(
    window=st.integers(1, 400),
    count=st.integers(1, 9),
    first=st.integers(0, 3),
    full=st.sets(st.integers(0, 8)),
    windowed=st.sets(st.integers(0, 8)),
)
def test_a_hit_has_every_full_chunk_and_its_window(
    engine: ChunkEngine,
    window: int,
    count: int,
    first: int,
    full: set[int],
    windowed: set[int],
) -> None:
    first = min(first, count)
    shape = geometry(window)
    cache = EmbeddedCache(engine, [kind.layout for kind in shape.kinds])
    chain = keys(count)
    for kind, present in enumerate((full, windowed)):
        wanted = [Wanted(shape.key(chain[i], kind), None, kind) for i in present if i < count]
        slots = cache.reserve(wanted)
        cache.commit(slots)  # type: ignore[arg-type]
    match = Match(cache, shape, chain, first=first, computed=first * CHUNK)
    assert match.done
    assert match.end == longest(full, windowed, shape, first, count)
    held = [slot.key for number in (0, 1) for _, slot in match.slots(number)]
    if match.end > first:
        start = max(shape.tail_start(match.end), first)
        want = chain[first : match.end]
        assert held == want + [shape.key(key, 1) for key in chain[start : match.end]]
    match.release()
    assert all(chunk.pins == 0 for chunk in engine.host._chunks.values())
    cache.reset()
    assert engine.host.used_bytes == 0


@given(window=st.integers(1, 400), chunk=st.integers(0, 20))
def test_what_is_stored_of_a_window_is_what_hits_at_chunk_ends_need(
    window: int, chunk: int
) -> None:
    sliding = group(1, window)
    stored = sliding.stored_range(chunk)
    for end in range(chunk + 1, chunk + 12):
        needed = range(max(0, end * CHUNK - window) // BLOCK, end * CHUNK // BLOCK)
        mine = range(chunk * CHUNK // BLOCK, (chunk + 1) * CHUNK // BLOCK)
        assert {i for i in needed if i in mine} <= set(stored)


def test_the_parts_of_a_slot_do_not_overlap() -> None:
    shape = Geometry.of(
        [group(0, None), group(1, 20), group(2, 100), group(3, None)],
        chunk_size=CHUNK,
        hit_step=BLOCK,
        parts=3,
        workers=6,
        description=b"test",
    )
    assert [[g.index for g in kind.groups] for kind in shape.kinds] == [[0, 3], [1, 2]]
    assert shape.hit_step == CHUNK, "inside a chunk a window is not whole"
    for kind in shape.kinds:
        ends = [at + 3 * g.part_bytes for g, at in zip(kind.groups, kind.offsets)]
        assert kind.offsets[0] == 0
        assert list(kind.offsets[1:]) == ends[:-1]
        assert ends[-1] == kind.layout.payload_bytes
    assert shape.kinds[1].groups[0].stored_blocks == 2, "20 tokens lie in two blocks"
    assert shape.kinds[0].layout.fingerprint != shape.kinds[1].layout.fingerprint
