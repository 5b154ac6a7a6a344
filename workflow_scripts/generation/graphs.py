"""Continuous batching in static slots: the backend `graphs`.

A slot holds one answer. Prompts wait, the longest first; as soon as an answer ends, the next prompt takes its slot:

    refill   prompts go into free slots: the keys and values of all their tokens but the last are computed, in batches of
             PREFILL rows; where a slot holds those of how a prompt begins, they are copied (generation/prefixes.py)
    burst    BURST steps, of one token for each slot: the first feeds the prompt's last token. What a slot is at stays on the
             device (`State`), an answer that has ended waits there, and nothing is read in between
    collect  one look at who has ended; their tokens are read, and `done` is called

On a GPU a step is a CUDA graph, captured once: shapes never change, there are `rows` rows whatever the slots, and the attention
kernel reads each row's length from the device. So what a row gives depends neither on what is beside it nor on the number of
slots, bit for bit, as long as products of one shape treat their rows alike. On a CPU the same steps run without a graph, one to
a burst, and rows are as many as there are answers, in multiples of CPU_ROWS: an answer moves to a lower slot where one is free.

Under `deterministic: true` all this stays as it is (`in_own_places`).

Another adapter of the same base is a copy into the same buffers (`load`): nothing is captured again.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workflow_scripts.generation import attention
from workflow_scripts.generation.answers import PREFILL, ROWS, Answer, Asked, Done
from workflow_scripts.generation.decoder import Decoder, compile_own
from workflow_scripts.generation.draws import choose
from workflow_scripts.generation.prefixes import Prefixes

BURST = 8  # steps on a GPU between two looks
CPU_ROWS, CPU_PREFILL = 16, 1024


class State(NamedTuple):
    """What each row is at: (rows,) integers, and what it has said. A row beyond the slots is never live."""

    token: Tensor  # the last one, which the next step feeds
    at: Tensor  # its position
    said: Tensor  # how many tokens the answer has
    limit: Tensor
    live: Tensor  # 1, or 0 once the answer has ended
    first: Tensor  # the random stream
    second: Tensor
    tokens: Tensor  # (rows, width + 1); the last column takes what rows of no answer write
    logprobs: Tensor

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        return self[:7]

    def rows(self, count: int) -> "State":
        return State(*(one[:count] for one in self))


def empty(rows: int, width: int, device: Any) -> State:
    numbers = [torch.zeros(rows, dtype=torch.long, device=device) for _ in range(7)]
    return State(*numbers, *(torch.zeros(rows, width + 1, dtype=kind, device=device) for kind in (torch.long, torch.float32)))


def take(logits: Tensor, temperature: float, top_k: int, top_p: float, logprobs: bool, state: State, ends: Tensor) -> None:
    """Choose each live row's next token; a row ends with one of `ends` or at its limit, and stays where it is."""
    token, logprob = choose(logits, temperature, top_k, top_p, (state.first, state.second), state.said, logprobs)
    going = state.live > 0
    column = torch.where(going, state.said, state.tokens.shape[1] - 1)[:, None]
    state.tokens.scatter_(1, column, token[:, None])
    if logprob is not None:
        state.logprobs.scatter_(1, column, logprob[:, None])
    state.said.add_(state.live)
    on = going & ~torch.isin(token, ends) & (state.said < state.limit)
    state.token.copy_(torch.where(on, token, state.token))
    state.at.add_(on)
    state.live.copy_(on)


def in_own_places(method: Callable) -> Callable:
    """A method of `Graphs`, without the sorted writes of torch's deterministic mode: 48 sorts a step of a 0.5 B model. It needs
    none to give the same bytes again. What a step writes of a row, keys, values and tokens, has a place of its own; rows of no
    answer write to a place that no answer reads; nothing is added up in memory. Shapes are fixed, and what is compiled for them
    is still chosen by rule (Inductor's own deterministic mode)."""

    @functools.wraps(method)
    def run(self: "Graphs", *args: Any, **kwargs: Any) -> Any:
        if not (self.gpu and torch.are_deterministic_algorithms_enabled()):
            return method(self, *args, **kwargs)
        from torch._inductor import config

        torch.use_deterministic_algorithms(False)
        config.deterministic = True
        try:
            return method(self, *args, **kwargs)
        finally:
            torch.use_deterministic_algorithms(True)

    return run


class Graphs:
    """Answers of a model whose architecture `decoder.unsupported` has nothing against.

    slots: answers at once, at most; they decide how much memory the cache takes. length: tokens of the longest prompt with its
    answer. adapter, exact: as for `Decoder`. rows: of a step on a GPU.
    """

    def __init__(self, model: Any, slots: int, length: int, adapter: str = "default", exact: bool = False, rows: int = ROWS):
        self.decoder = Decoder(model, adapter, exact)
        self.device = self.decoder.device
        self.gpu = self.device.type == "cuda"
        self.rows = rows
        self.slots = min(slots, rows) if self.gpu else slots
        self.length = -(-length // attention.BLOCK) * attention.BLOCK
        self.cache = self.decoder.cache(self.slots + 1, self.length)  # the last slot takes what rows of no answer write
        self.angles = self.decoder.angles(self.length)
        self.slot = torch.arange(max(rows, slots), device=self.device).clamp(max=self.slots)
        self.filling = torch.zeros(3, PREFILL, dtype=torch.long, device=self.device)  # token, slot, position of prefill's rows
        self.captured: dict[Any, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self.pool: Any = None
        self.state = empty(0, 0, self.device)
        self.prefixes = Prefixes()
        self.ends: dict[tuple[int, ...], Tensor] = {}
        self.take = take
        if self.gpu:
            self.decoder.compiled()
            self.take = compile_own(take)

    def load(self) -> None:
        """Take over the adapter as it is in the model now."""
        self.decoder.load()

    @in_own_places
    @torch.no_grad()
    def logits(self, ids: list[int], strength: float = 1.0) -> Tensor:
        """(tokens, vocabulary) in fp32 of one text, the adapter at a multiple of its strength."""
        if strength != 1.0:
            self.decoder.load(strength)
        rows = [(token, 0, at) for at, token in enumerate(ids)]
        found = torch.cat([self.decoder.plain_logits(x[:count]).float() for x, count in self._through(rows)])
        if strength != 1.0:
            self.decoder.load()
        return found

    @in_own_places
    @torch.no_grad()
    def answer(self, prompts: list[tuple[int, list[int]]], asked: Asked, done: Done) -> None:
        """prompts: (its place, which its random stream is made from; its token ids). AssertionError on one that does not fit."""
        assert all(len(ids) + asked.max_new_tokens <= self.length for _, ids in prompts), "a prompt is longer than was said"
        self._prepare(asked)
        waiting = deque((place, ids, sample) for place, ids in sorted(prompts, key=lambda one: (-len(one[1]), one[0]))
                        for sample in range(asked.samples))  # fmt: skip
        held: dict[int, tuple[int, int, int]] = {}  # slot -> (place, sample, tokens of the prompt)
        while waiting or held:
            free = [slot for slot in range(self.slots) if slot not in held]
            entering = [(slot, *waiting.popleft()) for slot in free[: len(waiting)]]
            self._fill(entering, asked)
            held |= {slot: (place, sample, len(ids)) for slot, place, ids, sample in entering}
            rows = self._gathered(held)
            for _ in range(BURST if self.gpu else 1):
                self._step(rows, asked)
            for slot, answer in self._ended(held, asked):
                place, sample, _ = held.pop(slot)
                done(place, sample, answer)

    # -- the parts of a round -----------------------------------------------------------------------------------------------

    def _prepare(self, asked: Asked) -> None:
        if self.state.tokens.shape[1] <= asked.max_new_tokens:
            self.state = empty(self.rows if self.gpu else self.slots, asked.max_new_tokens, self.device)
            # Their steps write to the old one. The prefill does not, and keeps the memory that all share alive.
            self.captured = {key: graph for key, graph in self.captured.items() if key == "prefill"}
            self.pool = self.pool if self.captured else None
        for one in self.state.numbers:
            one.zero_()
        self.prefixes.forget()  # the adapter may be another one
        if asked.ends not in self.ends:
            self.ends[asked.ends] = torch.tensor(asked.ends, device=self.device)

    def _fill(self, entering: list[tuple[int, int, list[int], int]], asked: Asked) -> None:
        if not entering:
            return
        for wave in self.prefixes.waves([(slot, ids) for slot, _, ids, _ in entering]):
            for entry in wave:
                self._copy(entry.source, entry.slot, entry.shared)
            rows = [(entry.ids[at], entry.slot, at) for entry in wave for at in range(entry.shared, len(entry.ids) - 1)]
            for _ in self._through(rows):
                pass
        slots = torch.tensor([slot for slot, *_ in entering], device=self.device)
        new = [
            (ids[-1], len(ids) - 1, 0, asked.max_new_tokens, 1, *asked.streams(place, sample))
            for _, place, ids, sample in entering
        ]
        for kept, values in zip(self.state.numbers, torch.tensor(new, device=self.device).T, strict=True):
            kept[slots] = values

    def _copy(self, slot: int, to: int, length: int) -> None:
        if length and slot != to:
            for kept in self.cache:
                kept[:, to, :, :length] = kept[:, slot, :, :length]

    def _through(self, rows: list[tuple[int, int, int]]) -> Iterator[tuple[Tensor, int]]:
        """Rows (token, slot, position) through the model, in batches of one size: (x of the batch, how many of it are rows)."""
        size = PREFILL if self.gpu else CPU_PREFILL
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            if not self.gpu:
                spans: list[tuple[int, int, int]] = []
                for _, slot, at in part:
                    if spans and spans[-1][0] == slot:
                        spans[-1] = (slot, spans[-1][1], spans[-1][2] + 1)
                    else:
                        spans.append((slot, at, 1))
                token, slot, at = torch.tensor(part).T
                yield self.decoder.forward(token, slot, at, self.cache, self.angles, attention.of_spans(spans)), len(part)
                continue
            padded = part + [(0, self.slots, 0)] * (size - len(part))
            self.filling.copy_(torch.tensor(padded).T)
            yield self._replay("prefill", self._prefill), len(part)

    def _prefill(self) -> Tensor:
        token, slot, at = self.filling
        return self.decoder.forward(token, slot, at, self.cache, self.angles, attention.on_gpu(slot, at))

    def _gathered(self, held: dict[int, tuple[int, int, int]]) -> int:
        """How many rows a step has. On a CPU, answers at the end move into free slots below, so that there are fewer."""
        if self.gpu:
            return self.rows
        rows = min(self.slots, -(-len(held) // CPU_ROWS) * CPU_ROWS)
        free = [slot for slot in range(rows) if slot not in held]
        for slot in sorted(held)[::-1]:
            if slot < rows:
                break
            to = free.pop(0)
            self._copy(slot, to, int(self.state.at[slot]) + 1)
            self.prefixes.moved(slot, to)
            for column in self.state:
                column[to] = column[slot]
            held[to] = held.pop(slot)
        return rows

    def _step(self, rows: int, asked: Asked) -> None:
        if self.gpu:
            key = (asked.temperature, asked.top_k, asked.top_p, asked.logprobs, asked.ends)
            self._replay(key, lambda: self._decode(rows, asked))
        else:
            self._decode(rows, asked)

    def _decode(self, rows: int, asked: Asked) -> None:
        state, slot = self.state.rows(rows), self.slot[:rows]
        attend = attention.on_gpu(slot, state.at) if self.gpu else attention.of_slots(rows, state.at, int(state.at.max()) + 1)
        x = self.decoder.forward(state.token, slot, state.at, self.cache, self.angles, attend)
        how = asked.temperature, asked.top_k, asked.top_p, asked.logprobs
        self.take(self.decoder.logits(x), *how, state, self.ends[asked.ends])

    def _ended(self, held: dict[int, tuple[int, int, int]], asked: Asked) -> list[tuple[int, Answer]]:
        state = self.state
        live, count = torch.stack((state.live, state.said)).tolist()
        slots = [slot for slot in held if not live[slot]]
        if not slots:
            return []
        tokens = state.tokens[slots].tolist()
        logprobs = state.logprobs[slots].tolist() if asked.logprobs else [None] * len(slots)
        found = []
        for slot, row, likely in zip(slots, tokens, logprobs, strict=True):
            row = row[: count[slot]]
            found.append((slot, Answer(row, row[-1] in asked.ends, likely and likely[: count[slot]])))
        return found

    # -- graphs -------------------------------------------------------------------------------------------------------------

    def _replay(self, key: Any, run: Any) -> Any:
        """What `run` does on the GPU, from its graph; captured first, after two runs to warm up. Returns what it returned."""
        if key not in self.captured:
            before = [one.clone() for one in self.state.numbers]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # type: ignore[attr-defined]
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = run()
            self.pool = self.pool or graph.pool()
            self.captured[key] = (graph, result)
            for one, value in zip(self.state.numbers, before, strict=True):
                one.copy_(value)  # what warming up has moved on
        graph, result = self.captured[key]
        graph.replay()
        return result
