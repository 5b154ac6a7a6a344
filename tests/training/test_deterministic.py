"""`deterministic: true`: equal runs end with the same bytes, or with a line that says why not (tests/gpu has the kernels)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from tests.conftest import make_clone
from tests.support import as_command, small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.generation import graphs
from workflow_scripts.models import device, loading
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.training import fused, speed

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import os, sys
from workflow_scripts.steps import cli

def main(job):
    loaded = "torch" in sys.modules
    import torch
    from workflow_scripts.models import device
    before = torch.cuda.is_initialized()
    device.prepare(job.step, job.deterministic)
    print([loaded, before, os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.are_deterministic_algorithms_enabled(),
           torch.is_deterministic_algorithms_warn_only_enabled(), torch.utils.deterministic.fill_uninitialized_memory])
    torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))

cli.run(main, "")
"""


def step_of_its_own(folder: Path, *more: str) -> subprocess.CompletedProcess:
    step = {"step": "train_sft", "config": {}, "parents": {}, "packages": {}, "device": "cpu", "precision": "fp32", "threads": 1}
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    return subprocess.run(
        [sys.executable, "-c", STEP, "--step", json.dumps(step), "--out", "out/manifest.json", *more],
        cwd=folder, capture_output=True, text=True, env=env,
    )  # fmt: skip


def test_the_settings_are_on_in_a_steps_process_and_what_has_no_such_way_is_one_line(tmp_path):
    done = step_of_its_own(tmp_path, "--deterministic", "--log", "log")
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[0] == str([False, False, ":4096:8", True, False, False])
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "Traceback" in log
    assert f"deterministic: true, but torch {torch.__version__} can't do put_ so that" in done.stderr
    assert "set `deterministic: false`, or leave out what needs it" in done.stderr


def test_without_the_key_a_cpu_warns_and_goes_on(tmp_path):
    done = step_of_its_own(tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == str([False, False, ":4096:8", True, True, False])


@pytest.fixture
def on_a_gpu(monkeypatch):
    """prepare(deterministic) as for a GPU that is not there; torch's settings as they were, afterwards."""
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic
    monkeypatch.setattr(device, "check_gpu", lambda *args, **kwargs: None)
    monkeypatch.setattr(device.gpus, "limit", lambda: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    step = {"device": "cuda", "precision": "bf16", "threads": torch.get_num_threads()}
    yield lambda deterministic: device.prepare(step, deterministic)
    torch.use_deterministic_algorithms(mode, warn_only=warns)
    torch.backends.cudnn.deterministic = cudnn


def now() -> tuple[bool, bool, bool]:
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return strict, inductor.deterministic, torch.backends.cudnn.deterministic


def test_on_a_gpu_it_is_off_but_where_it_was_asked_for(on_a_gpu):
    on_a_gpu(False)
    assert now() == (False, False, False) and not torch.are_deterministic_algorithms_enabled()
    on_a_gpu(True)
    assert now() == (True, True, True) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


class Engine:
    def __init__(self, gpu: bool):
        self.gpu = gpu

    @graphs.in_own_places
    def answer(self, fails: bool = False) -> tuple[bool, bool]:
        assert not fails
        return torch.are_deterministic_algorithms_enabled(), inductor.deterministic


def test_the_generator_writes_unsorted_and_compiles_by_rule(on_a_gpu):
    on_a_gpu(True)
    assert Engine(True).answer() == (False, True) and now() == (True, True, True)
    with pytest.raises(AssertionError):
        Engine(True).answer(fails=True)
    assert now() == (True, True, True)
    assert Engine(False).answer() == (True, True)
    on_a_gpu(False)
    assert Engine(True).answer() == (False, False)
    for method in (graphs.Graphs.answer, graphs.Graphs.logits):
        assert method.__wrapped__, "not in its own places"


@pytest.mark.parametrize("deterministic", [True, False])
def test_nothing_is_compiled_under_it(deterministic, small, tmp_path, monkeypatch, capsys):
    config = small_steps.train_config("sft_v2", gradient_checkpointing=False)
    job = small_steps.job("train_sft", tmp_path / "x/manifest.json", {"rows": small["sft"]}, config)
    job.step |= {"device": "cuda"}
    job.speed, job.deterministic = {"compiled": 1}, deterministic
    model = loading.load(manifests.read(small["base"]), tmp_path, "cpu", "fp32")
    monkeypatch.setattr(fused, "compile_pieces", lambda body: 2)
    speed.prepare(model, job)
    assert getattr(model.base_model, "compiled_pieces", 0) == (0 if deterministic else 2)
    assert ("nothing is compiled: `deterministic: true`" in capsys.readouterr().out) == deterministic


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return {"base": small_steps.write_base(folder / "base"), "sft": small_steps.sft_slice(folder / "data")}


def test_a_killed_and_resumed_training_ends_with_the_bytes_of_one_that_was_not(small, tmp_path):
    config = small_steps.train_config("sft_v2", per_device_train_batch_size=2, gradient_accumulation_steps=1, logging_steps=3)

    def job(place):
        parents = {"start": small["base"], "rows": small["sft"]}
        return small_steps.job("train_sft", tmp_path / place / "adapter/manifest.json", parents, config)

    whole, killed = job("whole"), job("killed")
    said = as_command.run(whole, "--deterministic")
    assert "resumed" not in said
    as_command.kill_in_the_middle(killed, "--deterministic", "--checkpoint-minutes", "0")
    assert "resumed at step" in as_command.run(killed, "--deterministic")
    assert as_command.digests(killed) == as_command.digests(whole)
    assert "adapter_model.safetensors" in as_command.digests(whole)
    run = json.loads((whole.out.parent / "run.json").read_text())
    assert "deterministic" not in run  # on a CPU there is nothing to ask for


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"device": "cuda", "precision": "bf16", "generation": {"backend": "vllm"}},
            "backend: found vllm with determ",
        ),
        (
            {"experiments": {"sft_v2": {"gpus": 4, "train": {"gradient_accumulation_steps": 4}}}},
            "sft_v2.gpus: found 4 with deterministic: true; .* take 1 or 2, or deterministic: false",
        ),
        ({"deterministic": "yes"}, "deterministic: found the string 'yes', expected true or false"),
    ],
)
def test_what_it_can_not_promise_is_refused_before_anything_runs(more, words):
    files = ["config/config.yaml"]
    data = merge(read_yaml(ROOT / files[0]), {"deterministic": True} | more)
    with pytest.raises(InputError, match=words):
        Config(data, files)


def test_two_cards_are_let_through():
    data = read_yaml(ROOT / "config/config.yaml")
    more = {"experiments": {"sft_v2": {"gpus": 2, "train": {"gradient_accumulation_steps": 4}}}, "deterministic": True}
    assert Config(merge(data, more)).gpus["sft_v2"] == 2


def test_the_rules_hand_it_on(tmp_path):
    clone = make_clone(tmp_path)
    said = clone.snakemake("-n", "-p", "results/base/manifest.json").stdout
    assert "--speed" in said and "--deterministic" not in said
    assert "--deterministic" in clone.snakemake("-n", "-p", "results/base/manifest.json", "--config", "deterministic=True").stdout
