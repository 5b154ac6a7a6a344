"""`deterministic: true` on a CUDA device: two runs, and one killed by SIGKILL and resumed, end with the same bytes.

python -m pytest tests/gpu/test_deterministic.py -s          (make test-gpu)
"""

import json

import pytest
import torch

from tests.support import as_command, small_steps
from workflow_scripts.tiny import world

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

SPEED = {"unpadded": True, "dequantised": True, "fused": True, "compiled": 1, "captured": True}
MORE = {
    "sft_v2": {"max_steps": 24},
    "dpo": {"max_steps": 24},
    "ppo_ifeval": {"max_steps": 24, "max_completion_length": 32, "steps_per_generation": 2, "num_iterations": 2},
}
PADDED = {"unpadded": False, "dequantised": False, "compiled": 0}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deterministic")
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384}
    rows = {
        "base": small_steps.write_base(folder / "base", steps=150, shape=shape),
        "sft_v2": small_steps.write_slice(folder / "data", "sft", world.sft_rows(400, seed=1, follow=0.5, numeric=0.1), 32),
        "dpo": small_steps.write_slice(folder / "data", "pairs", world.preference_rows(440, seed=1), 32),
        "ppo_ifeval": small_steps.write_slice(folder / "data", "instructions", world.eval_rows(300, seed=1, split="pairs"), 32),
        "prompts": small_steps.write_slice(folder / "data", "ifeval", world.eval_rows(2000, seed=1, split="pairs"), 0),
    }
    return folder, rows


def training(experiment, place, there, speed):
    folder, rows = there
    config = small_steps.train_config(
        experiment, optim="paged_adamw_32bit", logging_steps=1, gradient_checkpointing=False, **MORE[experiment]
    )
    parents = {"start": rows["base"], "rows": rows[experiment]}
    out = folder / experiment / place / "adapter/manifest.json"
    job = small_steps.job(f"train_{config['method']}", out, parents, config)
    job.step |= {"device": "cuda", "precision": "bf16"}
    job.speed = speed
    return job


def same_bytes(make):
    """make(place) -> a job. Two runs, and a killed one."""
    first, second, killed = (make(place) for place in ("first", "second", "killed"))
    said = as_command.run(first, "--deterministic")
    as_command.run(second, "--deterministic")
    as_command.kill_in_the_middle(killed, "--deterministic", "--checkpoint-minutes", "0")
    went_on = as_command.run(killed, "--deterministic")
    found = [as_command.digests(job) for job in (first, second, killed)]
    print(first.step["step"], found[0], flush=True)
    assert found[0] == found[1], "two runs differ"
    assert found[0] == found[2], "one that was killed and went on differs"
    run = next(first.out.parent.glob("*run.json"))
    assert json.loads(run.read_text())["deterministic"] is True
    return said, went_on


@pytest.mark.parametrize("experiment", MORE)
def test_a_training_ends_with_the_same_bytes(experiment, there):
    said, went_on = same_bytes(lambda place: training(experiment, place, there, SPEED))
    assert "resumed at step" in went_on
    if experiment != "ppo_ifeval":
        assert "nothing is compiled: `deterministic: true`" in said


@pytest.mark.parametrize("experiment", ["sft_v2", "dpo"])
def test_with_padding_and_bitsandbytes_own_layers_as_well(experiment, there):
    jobs = [training(experiment, f"padded {place}", there, PADDED) for place in ("first", "second")]
    for job in jobs:
        as_command.run(job, "--deterministic")
    assert as_command.digests(jobs[0]) == as_command.digests(jobs[1])


def test_answers_are_the_same_bytes(there):
    def make(place):
        folder, rows = there
        parents = {"start": rows["base"], "prompts": rows["prompts"]}
        out = folder / "answers" / place / "run/ifeval_responses.manifest.json"
        job = small_steps.job("generate", out, parents, small_steps.answering(48))
        job.step |= {"device": "cuda", "precision": "bf16"}
        return job

    _, went_on = same_bytes(make)
    assert "prompts were answered before: taken over" in went_on
