"""What is recorded as CUDA graphs is recorded as it is computed, and leaves nothing behind: on a CPU, where nothing is played."""

import gc
import weakref
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch

from tests.support import small_steps
from tests.support.small_adapter import adapted, batch, put_back_at_the_end
from workflow_scripts.training import captured, fused, speed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_steps.write_base(tmp_path_factory.mktemp("recordings") / "base", steps=5)


@pytest.mark.parametrize("fails", ["begin", "body", "end", "body and end", ""])
def test_what_fails_in_a_recording_is_told_and_no_workspace_stays_in_its_memory(monkeypatch, fails):
    order = []

    class Fragile:
        def capture_begin(self, **how):
            order.append("begin")
            if fails == "begin":
                raise RuntimeError("already recording")

        def capture_end(self):
            order.append("end")
            if "end" in fails:
                raise RuntimeError("the capture is invalid")

    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: order.append("clear"), raising=False)
    monkeypatch.setattr(captured, "renew_generator", lambda: order.append("renew"))
    told = {"begin": "already recording", "body": "full", "end": "the capture is invalid", "body and end": "full"}
    with pytest.raises(RuntimeError, match=told[fails]) if fails else nullcontext(), captured.recording(Fragile(), None):
        if "body" in fails:
            raise torch.OutOfMemoryError("full")
    ended = [] if fails == "begin" else ["end", "renew"] if "end" in fails else ["end"]  # else the generator stays at it
    assert order == ["clear", "begin", *ended, "clear"]


class Graph:
    """In place of a CUDA graph: what is recorded runs, and nothing is played."""

    def capture_begin(self, **how):
        pass

    def capture_end(self):
        pass

    replay = capture_end


@pytest.fixture
def in_autocast(base, monkeypatch):
    """(A step of a model whose layers are recorded, and whose pieces are compiled; the kinds that were compiled; the layers)"""
    model = adapted(base)
    body = put_back_at_the_end(model, monkeypatch)
    compiled, real = [], torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda piece, **how: real(piece, backend=lambda code, _: (compiled.append(piece), code.forward)[1], **how),
    )
    fused.fuse(model)
    fused.compile_pieces(body)
    speed.Unpadded(model.get_base_model())
    for name, value in {
        "CUDAGraph": Graph, "graph_pool_handle": object, "Stream": MagicMock, "current_stream": MagicMock,
        "stream": lambda stream: nullcontext(), "memory_allocated": lambda: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(captured.Arena, "has_room", lambda arena, tokens: True)
    monkeypatch.setattr(captured.Arena, "spare", lambda arena: 1 << 40)
    monkeypatch.setattr(captured.Arena, "release", lambda arena: setattr(arena, "pool", None))
    layers = captured.Captured(body)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch()).logits
        logits.float().square().mean().backward()
        return logits

    yield step, compiled, layers
    torch._dynamo.reset()


def test_nothing_is_compiled_in_a_recording(in_autocast):
    step, compiled, layers = in_autocast
    plain = step()
    step()
    kinds = len(compiled)
    assert kinds >= 6 and layers.count == 0
    assert torch.allclose(plain, step(), atol=1e-2)
    assert (layers.count, len(compiled)) == (1, kinds)


def test_what_was_played_keeps_no_recording_when_its_gradient_is_taken(in_autocast):
    step, _, layers = in_autocast
    for _ in range(captured.OFTEN[True]):
        kept = step()  # its gradient was taken, and somebody keeps a result
    (made,) = map(weakref.ref, layers.made.values())
    assert kept.requires_grad
    layers.made.clear()
    assert made() is None


def test_a_recording_that_fails_half_way_leaves_nothing_in_memory(in_autocast, monkeypatch):
    step, _, layers = in_autocast

    def full(*given, **how):  # the forward pass is recorded
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.autograd, "grad", full)
    for _ in range(captured.OFTEN[True]):
        step()
    assert layers.refused == {(256, True)}
    assert not [one for one in gc.get_objects() if type(one) is captured.Recording]


def test_a_pool_in_which_a_recording_failed_takes_no_other(in_autocast, monkeypatch):
    """torch keeps it open, or counts it as gone: each later recording in it failed, whatever its size."""
    _, _, layers = in_autocast
    pools, right = [], captured.Recording

    def noted(of, given, longest, grads, pool, stream):
        pools.append((given[0].shape[1], pool))
        if len(pools) == 1:
            raise torch.OutOfMemoryError
        return right(of, given, longest, grads, pool, stream)

    monkeypatch.setattr(captured, "Recording", noted)
    for rows in ([[5, 9]], [[5] * 300], [[5] * 600]):
        given = batch(rows)
        with torch.no_grad():
            for _ in range(captured.OFTEN[False] + 1):
                layers.body(**{name: given[name] for name in ("input_ids", "attention_mask")}, use_cache=False)
    (_, failed), (_, second), (_, third) = pools
    assert layers.refused == {(256, False)} and layers.count == 2
    assert failed is not second and second is third


def test_a_failure_with_a_gradient_gives_the_arena_back_and_forbids_no_pass_without_one(in_autocast, monkeypatch):
    step, _, layers = in_autocast
    layers.arena.pool = "arena"

    def full(*given, **how):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.autograd, "grad", full)
    for _ in range(captured.OFTEN[True]):
        step()
    assert layers.arena.pool is None and layers.refused == {(256, True)} and layers.count == 0
    with torch.no_grad():
        for _ in range(captured.OFTEN[False]):
            layers.body(**{name: batch()[name] for name in ("input_ids", "attention_mask")}, use_cache=False)
    assert layers.count == 1


def test_what_would_have_to_be_compiled_in_a_recording_is_not_recorded(in_autocast, monkeypatch, capsys):
    step, compiled, layers = in_autocast
    monkeypatch.setattr(captured, "after_autocast", lambda out: nullcontext())
    plain = step()
    step()
    kinds = len(compiled)
    assert torch.allclose(plain, step(), atol=1e-2)
    assert (layers.count, len(compiled)) == (0, kinds)
    assert "batches of 256 tokens run kernel by kernel: " in capsys.readouterr().out
