"""The pool of blocks: none is given out twice, counts add up, and memories go by their owner and their tokens."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tenon.models.blocks import BlockKey, BlockPool, block_keys

ids = st.lists(st.integers(0, 2**40), max_size=40)


class Shadow:
    """A pool beside what it must agree with: who holds which block, and what each remembered block contains."""

    def __init__(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.held: list[int] = []
        self.content: dict[int, BlockKey] = {}
        self.names = 0

    def take(self, wanted: int) -> None:
        if not self.pool.available:
            return
        grant = self.pool.take(wanted)
        assert grant.block not in self.held
        assert grant.stale == (grant.block in self.content)
        old = self.content.pop(grant.block, None)
        if grant.moved_to is not None:
            assert old is not None and grant.moved_to not in self.held
            self.content[grant.moved_to] = old
        self.held.append(grant.block)

    def release(self, at: int) -> None:
        if self.held:
            block = self.held.pop(at % len(self.held))
            free = self.pool.release(block)
            assert free == (block not in self.held and block not in self.content)

    def remember(self, at: int) -> None:
        if self.held:
            block = self.held[at % len(self.held)]
            key = BlockKey("owner", self.names.to_bytes(4, "big"))
            self.names += 1
            self.pool.remember(block, key)
            self.content.setdefault(block, key)

    def share(self, at: int) -> None:
        if self.content:
            block, key = sorted(self.content.items())[at % len(self.content)]
            assert self.pool.find([key]) == [block]
            self.pool.share(block)
            self.held.append(block)

    def check(self) -> None:
        pool, users = self.pool, Counter(self.held)
        assert pool.used == len(users)
        assert pool.cached == len(self.content.keys() - users.keys())
        assert pool.available == pool.total - pool.used
        assert [pool.users(block) for block in range(pool.total)] == [users[block] for block in range(pool.total)]
        free = [block for block in range(pool.total) if block not in users and block not in self.content]
        assert [block for block in range(pool.total) if pool.is_free[block]] == free
        assert all(pool.find([key]) == [block] for block, key in self.content.items())


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(["take", "release", "remember", "share"]), st.integers(-1, 7)), max_size=60),
)
def test_any_order_of_taking_and_giving_back_adds_up(total: int, steps: list[tuple[str, int]]) -> None:
    shadow = Shadow(total)
    for what, number in steps:
        getattr(shadow, what)(number)
        shadow.check()
    while shadow.held:
        shadow.release(0)
    shadow.check()
    assert shadow.pool.used == 0 and shadow.pool.available == total


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    pool, keys = BlockPool(3), block_keys("a", range(6), 2)
    for number, key in enumerate(keys):
        assert pool.take(number).block == number
        pool.remember(number, key)
    for number in (1, 0, 2):
        pool.release(number)
    pool.share(1)
    pool.release(1)
    assert [pool.take(-1).block for _ in range(3)] == [0, 2, 1]
    assert pool.find(keys) == []


def test_a_block_that_is_wanted_moves_what_it_remembers() -> None:
    pool, keys = BlockPool(3), block_keys("a", range(4), 2)
    for number, key in enumerate(keys):
        pool.take(number)
        pool.remember(number, key)
        pool.release(number)
    grant = pool.take(0)
    assert (grant.block, grant.stale, grant.moved_to) == (0, True, 2)
    assert pool.find(keys) == [2, 1]
    grant = pool.take(1)  # nothing is free: the oldest memory goes, and what lay in 1 takes its block
    assert (grant.block, grant.moved_to) == (1, 2)
    assert pool.find(keys) == [] and pool.find(keys[1:]) == [2]


@given(ids, ids, st.integers(1, 9))
def test_keys_are_equal_exactly_as_far_as_tokens_are(one: list[int], other: list[int], block_tokens: int) -> None:
    keys = block_keys("a", one, block_tokens)
    assert len(keys) == len(one) // block_tokens
    assert not set(keys) & set(block_keys("b", one, block_tokens))
    for i, (key, its) in enumerate(zip(keys, block_keys("a", other, block_tokens), strict=False), start=1):
        assert (key == its) == (one[: i * block_tokens] == other[: i * block_tokens])
