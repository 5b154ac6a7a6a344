"""The layers of a decoder as CUDA graphs: what a processor launches kernel by kernel, thousands a step, becomes one launch.

A batch without padding (training/speed.py) is one row of tokens. It gets a size of few: the next multiple of an eighth of the
power of two below it, at least 256; what is added is a text of its own, whose hidden states nobody reads. A size that has come
up often enough is recorded, forwards and, where a gradient is taken, backwards, and played from then on; until then, and wherever
a recording does not hold, the same layers run as they are, on the same padded row. So a recording changes no number.

A recording holds for: the size, how many texts there is room for, whether a gradient is taken, dropout acts, and which adapters
act, and the places in memory of all weights (`_state`). The embedding, the rotary angles, the last norm and the head are outside.

All recordings with a gradient share one piece of memory (`Arena`), as one batch at a time is in flight. Between a batch's forward
and its backward pass no other may be played with a gradient: it would overwrite what the first keeps, and runs as it is. The
arena lies beside the memory of batches that run as they are: where the card, or this job's share of it, has no room for both,
nothing larger is recorded; and it is given back where a batch needs the memory.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from workflow_scripts.plumbing import gpus

OFTEN = {True: 3, False: 6}  # from which time on a size is recorded, with a gradient and without: it costs several passes
LEAST = 2 * 2**30  # bytes that are free where a pass without a gradient is recorded
TEXTS = 8  # room for texts comes in multiples of it


def size_of(tokens: int) -> int:
    grain = max(256, (1 << tokens.bit_length()) // 16)
    return -(-tokens // grain) * grain


class Token:
    """Alive as long as a batch's backward pass may come."""


@contextmanager
def recording(graph: Any, pool: Any) -> Iterator[None]:
    """What torch.cuda.graph does, without clearing caches and collecting garbage each time.

    Workspaces of cuBLAS are let go before and after, as torch's own trees of graphs do it: one that is made within a recording
    stays in its pool, and a piece of memory with something in it is not given back, be it the whole arena.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # what failed first is what is told
                end(graph)
            raise
        end(graph)
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def end(graph: Any) -> None:
    """RuntimeError if a recording can't even be ended. That leaves torch's generator at it: whatever drew next would fail, so it
    gets a new state. What was recorded before would fail too, and is to be let go."""
    try:
        graph.capture_end()
    except RuntimeError:
        renew_generator()
        raise


def renew_generator() -> None:
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def collector_off() -> Iterator[None]:
    """What it would free in the middle of a recording may be another recording's."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def after_autocast(out: Tensor) -> Any:
    """As trainers take gradients: when the forward pass, and autocast with it, is over. torch compiles other code within it."""
    return torch.autocast(out.device.type, enabled=False)


class Recording:
    """The layers over rows of one size. `grads`: the parameters whose gradients it makes, none without a gradient."""

    def __init__(
        self, layers: "Layers", given: tuple[Tensor, ...], longest: int, grads: list[nn.Parameter], pool: Any, stream: Any
    ):
        self.given = tuple(one.clone() for one in given)
        self.grads = grads
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        # A batch of this size ran as it is before, so all is compiled; what would be compiled now can't be, and fails.
        with torch.cuda.stream(stream), collector_off(), torch.compiler.set_stance("fail_on_recompile"):
            with recording(self.forward, pool):
                out = layers(self.given, longest)
            self.out = out.detach()
            if grads:
                self.dout = torch.zeros_like(self.out)
                with after_autocast(self.out), recording(self.backward, pool):
                    found = torch.autograd.grad(out, grads, self.dout, allow_unused=True)
                    self.flat = torch.cat([one.reshape(-1) for one in found if one is not None])
                self.shapes = [None if one is None else one.shape for one in found]
            del out
        torch.cuda.current_stream().wait_stream(stream)

    def play(self, given: tuple[Tensor, ...]) -> Tensor:
        for mine, theirs in zip(self.given, given, strict=True):
            mine.copy_(theirs)
        self.forward.replay()
        return self.out.clone()

    def play_back(self, dout: Tensor) -> list[Tensor | None]:
        self.dout.copy_(dout)
        self.backward.replay()
        parts: list[Tensor | None] = []
        at = 0
        flat = self.flat.clone()
        for shape in self.shapes:
            if shape is None:
                parts.append(None)
                continue
            parts.append(flat[at : at + shape.numel()].view(shape))
            at += shape.numel()
        return parts


class Played(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, token: Token, given: tuple[Tensor, ...], *grads: Tensor) -> Tensor:
        ctx.recording, ctx.token = recording, token
        return recording.play(given)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple:
        found = ctx.recording.play_back(douts[0])
        ctx.token = ctx.recording = None  # whoever still holds the output holds no arena
        return (None, None, None, *found)


class Arena:
    """One piece of memory for all recordings with a gradient, which come to lie over each other in it. Without it torch's
    allocator would have a piece of its own for each, since a tensor of one size does not go into the place of another."""

    def __init__(self) -> None:
        self.capacity = 0
        self.each = 0.0  # bytes that the layers keep of a token until its backward pass
        self.stream: Any = None
        self.pool: Any = None
        self.kept: Any = None

    def has_room(self, tokens: int) -> bool:
        return self.capacity >= self.needed(tokens)

    def needed(self, tokens: int) -> int:
        return int(1.2 * self.each * tokens) + 2**30  # what passes by within a layer, and the results that stay

    def spare(self) -> int:
        """Bytes of the card, or of this job's share of it, that no tensor and no arena has. What torch keeps for later counts as
        free: it gives it back before it fails."""
        most = gpus.limit()
        if most is None:
            most = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        return most - torch.cuda.memory_allocated() - self.capacity

    def possible(self, tokens: int) -> int:
        """Bytes of an arena for this size and some larger ones, if there is room beside a batch that runs as it is; else 0."""
        free = int(0.95 * (self.spare() + self.capacity - self.needed(tokens)))
        capacity = min(self.needed(tokens + tokens // 4), free)
        return capacity if capacity >= self.needed(tokens) else 0

    def release(self) -> None:
        """What was recorded in it has to be gone."""
        self.pool, self.kept, self.capacity = None, None, 0
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def renew(self, capacity: int) -> None:
        self.release()
        gpus.remember_peak(torch.cuda.max_memory_allocated())
        self.reserve(capacity)
        torch.cuda.reset_peak_memory_stats()
        self.capacity = capacity

    def reserve(self, capacity: int) -> None:
        self.pool, self.kept = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream), recording(self.kept, self.pool):
            torch.empty(capacity, dtype=torch.uint8, device="cuda")[:1].zero_()


class Layers:
    """A decoder's layers, over (hidden (1, tokens, H), cos, sin (1, tokens, size), ends (texts + 1,))."""

    def __init__(self, body: Any):
        self.layers = body.layers

    def __call__(self, given: tuple[Tensor, ...], longest: int) -> Tensor:
        hidden, cos, sin, ends = given
        # Weights that autocast casts are not kept from one pass to the next: a recording would hold on to them.
        kind = hidden.device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
            for layer in self.layers:
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_embeddings=(cos, sin),
                    position_ids=None,
                    past_key_values=None,
                    use_cache=False,
                    cu_seq_lens_q=ends,
                    cu_seq_lens_k=ends,
                    max_length_q=longest,
                    max_length_k=longest,
                )
        return hidden


class Captured:
    """In place of a decoder's forward pass, where a batch comes without padding; else that."""

    def __init__(self, body: Any, record: bool = True):
        self.body, self.plain, self.layers, self.record = body, body.forward, Layers(body), record
        self.seen: Counter[tuple] = Counter()
        self.made: dict[tuple, Recording] = {}  # with a gradient, in the arena
        self.passing: dict[tuple, Recording] = {}  # without, in a pool of their own
        self.arena = Arena()
        self.pool: Any = None
        self.count = 0  # of recordings, those that were given up too
        self.refused: set[tuple[int, bool]] = set()  # sizes, with a gradient or without, that could not be recorded
        self.where: int | None = None
        self.open: Any = lambda: None
        body.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ends = kwargs.get("cu_seq_lens_q")
        if args or ends is None:
            return self.plain(*args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        body, tokens = self.body, kwargs["input_ids"].shape[1]
        size = size_of(tokens)
        more = size - tokens
        ids, position = (torch.nn.functional.pad(kwargs[name], (0, more)) for name in ("input_ids", "position_ids"))
        texts = -(-len(ends) // TEXTS) * TEXTS
        ends = torch.nn.functional.pad(ends, (0, texts + 1 - len(ends)), value=size)
        longest = max(512, 1 << (max(kwargs["max_length_q"], more) - 1).bit_length())
        hidden = body.embed_tokens(ids)
        cos, sin = body.rotary_emb(hidden, position)
        hidden = self.run((hidden, cos, sin, ends), longest)[:, :tokens]
        return BaseModelOutputWithPast(last_hidden_state=body.norm(hidden))

    def run(self, given: tuple[Tensor, ...], longest: int) -> Tensor:
        parameters = list(self.body.layers.parameters())
        grads = [one for one in parameters if one.requires_grad] if torch.is_grad_enabled() else []
        if given[0].requires_grad or not self.record or torch.is_inference_mode_enabled():
            return self.layers(given, longest)
        if (where := hash(tuple(one.data_ptr() for one in parameters))) != self.where:  # weights have moved: none holds
            self.made.clear()
            self.passing.clear()
            self.seen.clear()
            self.where = where
        state = (
            *self._state(),
            longest,
            tuple(one.shape for one in given),
            tuple(one.requires_grad for one in parameters) if grads else None,
        )
        self.seen[state] += 1
        if self.seen[state] < OFTEN[bool(grads)] or grads and self.open() is not None:
            return self._as_it_is(given, longest, bool(grads))
        if not self._recorded(state, given, longest, grads):
            return self._as_it_is(given, longest, bool(grads))
        if not grads:
            return self.passing[state].play(given)
        token = Token()
        self.open = weakref.ref(token)
        return Played.apply(self.made[state], token, given, *grads)  # type: ignore[no-any-return]

    def _recorded(self, state: tuple, given: tuple[Tensor, ...], longest: int, grads: list[nn.Parameter]) -> bool:
        """Whether there is a recording, made now if need be. A size that there was no room for once is not asked about again."""
        size, kept = given[0].shape[1], self.made if grads else self.passing
        kind, begun = (size, bool(grads)), False
        if state in kept:
            return True
        if kind in self.refused:
            return False
        try:
            self.arena.stream = self.arena.stream or torch.cuda.Stream()
            if grads and not self.arena.has_room(size):
                if not (capacity := self.arena.possible(size)):
                    raise torch.OutOfMemoryError
                self.made.clear()
                self.arena.renew(capacity)
            if not grads:
                if self.arena.spare() < LEAST:
                    raise torch.OutOfMemoryError
                self.pool = self.pool if self.passing else torch.cuda.graph_pool_handle()  # with its last graph a pool is gone
            begun = True
            pool = self.arena.pool if grads else self.pool
            kept[state] = Recording(self.layers, given, longest, grads, pool, self.arena.stream)
            self.count += 1
            return True
        except RuntimeError as error:
            said = str(error).splitlines() or [type(error).__name__]
            why = "there is no room to record them" if isinstance(error, torch.OutOfMemoryError) else said[0]
        self.refused.add(kind)
        if begun:  # a pool in which a recording failed may take no other; nor may those before it be played
            self.made.clear()
            self.passing.clear()
            self.arena.release()
        gc.collect()  # what the failure's traceback holds may hold memory
        print(f"batches of {size:,} tokens run kernel by kernel{'' if grads else ' without a gradient'}: {why}", flush=True)
        return False

    def _as_it_is(self, given: tuple[Tensor, ...], longest: int, grads: bool) -> Tensor:
        if grads and self.arena.capacity and self.arena.spare() < self.arena.needed(given[0].shape[1]):
            print("no batch is recorded any more: a longer one needs the memory", flush=True)
            self.record = False
            self.made.clear()
            self.passing.clear()
            self.arena.release()
        before = torch.cuda.memory_allocated()
        out = self.layers(given, longest)
        if grads:
            self.arena.each = max(self.arena.each, (torch.cuda.memory_allocated() - before) / given[0].shape[1])
        return out

    def _state(self) -> tuple:
        adapted = next((one for one in self.body.layers.modules() if hasattr(one, "lora_A")), None)
        act = () if adapted is None or adapted.disable_adapters else tuple(adapted.active_adapters)
        return (
            act,
            self.body.training,
            torch.is_autocast_enabled("cuda"),
            None if adapted is None else tuple(sorted(adapted.scaling.items())),
        )
