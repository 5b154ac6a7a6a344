"""What is recorded as CUDA graphs: by a process of its own, as a phase is, and with its memory given back.

python -m pytest tests/gpu/test_recordings.py -s          (make test-gpu)
"""

import json

import pytest
import torch

from tests.support import as_command, small_steps
from workflow_scripts.tiny import world
from workflow_scripts.training import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def test_a_phase_with_a_warm_compile_cache_records_as_the_first_one_did(tmp_path, monkeypatch):
    """With a warm cache nothing had been compiled in the process when it recorded, and what was compiled then ended it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384}
    base = small_steps.write_base(tmp_path / "base", steps=20, shape=shape)
    rows = small_steps.write_slice(tmp_path / "data", "sft", world.sft_rows(400, seed=1, follow=0.5, numeric=0.1), 32)
    config = small_steps.train_config("sft_v2", optim="paged_adamw_32bit", gradient_checkpointing=False, max_steps=24)
    for place in ("cold", "warm"):
        job = small_steps.job("train_sft", tmp_path / place / "adapter/manifest.json", {"start": base, "rows": rows}, config)
        job.step |= {"device": "cuda", "precision": "bf16"}
        job.speed = {"unpadded": True, "dequantised": True, "fused": True, "compiled": 1, "captured": True}
        assert "kernel by kernel" not in as_command.run(job)
        done = json.loads((job.out.parent / "run.json").read_text())["speed"]
        assert done["compiled"] and done["captured"]


def test_after_a_recording_that_failed_others_are_made():
    """In the same pool none could: torch says that it is recording already."""
    stream, weight = torch.cuda.Stream(), torch.randn(64, 64, device="cuda")
    with torch.cuda.stream(stream):
        weight @ weight  # as a batch runs as it is before its size is recorded
    with torch.cuda.stream(stream), pytest.raises(torch.OutOfMemoryError):
        with captured.recording(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
            torch.empty(2**45, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), captured.recording(graph, torch.cuda.graph_pool_handle()):
        made = torch.nn.functional.dropout(weight @ weight)
    graph.replay()
    torch.cuda.synchronize()
    assert made.isfinite().all() and torch.nn.functional.dropout(weight).isfinite().all()


def test_after_a_recording_that_could_not_be_ended_dropout_draws():
    """torch's generator was left at it, and said so at the next draw."""
    stream, weight = torch.cuda.Stream(), torch.randn(64, 64, device="cuda")
    with torch.cuda.stream(stream), pytest.raises(RuntimeError):
        with captured.recording(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
            torch.nn.functional.dropout(weight)
            weight.sum().item()  # what nothing that is recorded may do
    torch.cuda.synchronize()
    assert not torch.equal(torch.nn.functional.dropout(weight), torch.nn.functional.dropout(weight))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), captured.recording(graph, torch.cuda.graph_pool_handle()):
        made = torch.nn.functional.dropout(weight)
    graph.replay()
    first = made.clone()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(first, made)


def test_the_memory_of_recordings_comes_back():
    """A product leaves a workspace in what is recorded, which had held all of an arena."""
    arena, weight = captured.Arena(), torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    arena.stream = torch.cuda.Stream()
    before = torch.cuda.memory_reserved()
    arena.renew(2**30)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(arena.stream), captured.recording(graph, arena.pool):
        weight @ weight
    assert torch.cuda.memory_reserved() >= before + 2**30
    del graph
    arena.release()
    assert torch.cuda.memory_reserved() < before + 2**29
