"""Which slots hold the keys and values of how a prompt begins (generation/graphs.py), so that these are computed once.

Prompts of one task often begin alike: eight worked examples before each question, a system prompt, several answers to one prompt.
The keys and values of a position are functions of the tokens up to it and of nothing else. So what one slot holds of a common
beginning is copied into the next, and only the rest goes through the model. A copy has the bits of what it is a copy of, and on a
GPU a row gives the same bits in whatever batch it is computed: there, answers are those without sharing, bit for bit, and it
does not matter which prompts are left after a kill. On a CPU a product's rounding depends on how many rows it has, as it does
without sharing. Nothing is kept for it but what the slots hold anyway.

Beginnings are looked up by a hash for each BLOCK tokens, chained (as vLLM does, Kwon et al. 2023, arXiv:2309.06180), and one for
the whole prompt; a hit is compared token by token, and goes on as far as both agree. All is forgotten with each call of `answer`:
between two calls the adapter may have changed.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 64  # tokens; a common beginning of fewer is computed again: it saves little


class Entry(NamedTuple):
    """A prompt that goes into a slot. The keys and values of its first `shared` tokens are in slot `source`."""

    slot: int
    ids: list[int]
    source: int
    shared: int


def beginnings(ids: list[int]) -> list[tuple[int, int]]:
    """(how many tokens, their hash), the longest first. The last token of a prompt is fed by the first step of decoding."""
    found, key, last = [], 0, len(ids) - 1
    for first in range(0, last, BLOCK):
        until = min(first + BLOCK, last)
        key = hash((key, *ids[first:until]))
        found.append((until, key))
    return found[::-1]


class Prefixes:
    def __init__(self) -> None:
        # slot -> the prompt whose keys and values are there, but those of its last token; its beginnings
        self.held: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        self.where: defaultdict[int, set[int]] = defaultdict(set)  # hash -> slots

    def forget(self) -> None:
        self.held.clear()
        self.where.clear()

    def waves(self, entering: list[tuple[int, list[int]]]) -> Iterator[list[Entry]]:
        """(slot, prompt) in groups: what an entry is copied from is there as soon as the groups before it are computed."""
        for slot, _ in entering:
            self._drop(slot)
        waiting = [(slot, ids, beginnings(ids)) for slot, ids in entering]
        while waiting:
            begun: set[int] = set()
            wave, there, later = [], [], []
            for slot, ids, keys in waiting:
                source, count = self._longest(ids, keys)
                if any(key in begun for length, key in keys if length > count):
                    later.append((slot, ids, keys))  # it has more in common with one of this group
                    continue
                wave.append(Entry(slot, ids, source, count))
                there.append((slot, ids, keys))
                begun.update(key for _, key in keys)
            yield wave
            for one in there:
                self._put(*one)
            waiting = later

    def moved(self, slot: int, to: int) -> None:
        """What `slot` holds is now in slot `to` as well."""
        self._drop(to)
        self._put(to, *self.held[slot])

    def _longest(self, ids: list[int], keys: list[tuple[int, int]]) -> tuple[int, int]:
        """(slot, how many of the first tokens it holds); (-1, 0) where there is none."""
        for count, key in keys:
            slot = min(self.where.get(key, ()), default=-1)
            held = self.held[slot][0] if slot >= 0 else []
            if slot < 0 or held[:count] != ids[:count]:
                continue
            most = min(len(ids), len(held)) - 1
            while count < most and ids[count] == held[count]:
                count += 1
            return slot, count
        return -1, 0

    def _put(self, slot: int, ids: list[int], keys: list[tuple[int, int]]) -> None:
        self.held[slot] = (ids, keys)
        for _, key in keys:
            self.where[key].add(slot)

    def _drop(self, slot: int) -> None:
        for _, key in self.held.pop(slot, ([], []))[1]:
            self.where[key].discard(slot)
