"""The allocator: no overlap, nothing lost, a double free raises."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_core.memory.allocator import Allocator, AllocatorError
from lmcache_core.sdk.errors import ConfigError

PAGE = 4096


def test_sizes_are_rounded_up_and_counted() -> None:
    allocator = Allocator(4 * PAGE + 17)
    offset = allocator.alloc(PAGE + 1)
    assert offset == 0
    assert allocator.size_of(0) == allocator.used_bytes == 2 * PAGE
    assert allocator.capacity_bytes == 4 * PAGE


def test_full_gives_none_and_freed_slots_come_back() -> None:
    allocator = Allocator(2 * PAGE)
    first, second = allocator.alloc(PAGE), allocator.alloc(PAGE)
    assert allocator.alloc(1) is None
    assert first is not None and second is not None
    allocator.free(first)
    assert allocator.alloc(2 * PAGE) is None
    assert allocator.alloc(PAGE) == first


def test_small_neighbours_coalesce_into_a_large_slot() -> None:
    allocator = Allocator(8 * PAGE)
    for offset in [allocator.alloc(PAGE) for _ in range(8)]:
        assert offset is not None
        allocator.free(offset)
    assert allocator.alloc(8 * PAGE) == 0


@pytest.mark.parametrize("offset", [PAGE, 1, -PAGE, 1 << 40])
def test_unknown_offsets_raise(offset: int) -> None:
    allocator = Allocator(4 * PAGE)
    allocator.alloc(2 * PAGE)
    with pytest.raises(AllocatorError):
        allocator.free(offset)
    with pytest.raises(AllocatorError):
        allocator.size_of(offset)
    assert allocator.used_bytes == 2 * PAGE


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_slot_without_bytes_raises(nbytes: int) -> None:
    with pytest.raises(AllocatorError):
        Allocator(PAGE).alloc(nbytes)


@pytest.mark.parametrize(("nbytes", "alignment"), [(0, PAGE), (-1, 1), (100, PAGE), (PAGE, 3)])
def test_a_range_without_slots_is_a_config_error(nbytes: int, alignment: int) -> None:
    with pytest.raises(ConfigError):
        Allocator(nbytes, alignment=alignment)


class Machine(RuleBasedStateMachine):
    """Against a model: the set of pages that each live slot covers."""

    PAGES = 24

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(self.PAGES * PAGE)
        self.live: dict[int, int] = {}

    def gaps(self) -> list[int]:
        """Sizes of the free stretches of the model, in pages."""
        taken = {o // PAGE + i for o, n in self.live.items() for i in range(n)}
        text = "".join("x" if page in taken else "." for page in range(self.PAGES))
        return [len(run) for run in text.split("x")]

    @rule(pages=st.integers(1, 9), short=st.integers(0, PAGE - 1))
    def alloc(self, pages: int, short: int) -> None:
        offset = self.allocator.alloc(pages * PAGE - short)
        if offset is None:
            assert max(self.gaps()) < pages, "refused although it fits"
            return
        end = offset + pages * PAGE
        assert offset % PAGE == 0 and offset >= 0 and end <= self.PAGES * PAGE
        assert all(end <= o or o + n * PAGE <= offset for o, n in self.live.items())
        self.live[offset] = pages

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_twice(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        self.allocator.free(offset)
        del self.live[offset]
        with pytest.raises(AllocatorError):
            self.allocator.free(offset)

    @rule()
    def free_all_and_take_everything(self) -> None:
        for offset in self.live:
            self.allocator.free(offset)
        self.live.clear()
        assert self.allocator.alloc(self.PAGES * PAGE) == 0
        self.allocator.free(0)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.allocator.used_bytes == sum(self.live.values()) * PAGE
        assert all(self.allocator.size_of(o) == n * PAGE for o, n in self.live.items())


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
