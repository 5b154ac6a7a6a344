"""A training by several ranks is that of one process: same losses, figures, objective and weights, up to the order of sums."""

import pytest
from safetensors.torch import load_file

from tests.support import several, small_steps
from tests.support.right_way import sample

STEPS = 30
SHARED = {"max_steps": STEPS, "gradient_accumulation_steps": 4, "logging_steps": 1}
OF_METHOD = {
    "sft_v2": {"per_device_train_batch_size": 2},
    "dpo": {"per_device_train_batch_size": 2},
    "simpo": {"per_device_train_batch_size": 2},
    "kto": {"per_device_train_batch_size": 4},
    "rm": {"per_device_train_batch_size": 2},
    "grpo": {
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "steps_per_generation": 4,
    },
    "rloo": {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "steps_per_generation": 4},
}


def step_of(method, base, slices, out, dropout=0.0, **more):
    settings = SHARED | OF_METHOD[method] | more
    config = small_steps.train_config(method, **settings, lora=small_steps.LORA | {"dropout": dropout})
    parents = {"start": base, "rows": slices[method]}
    return small_steps.job(f"train_{config['method']}", out / "adapter" / "manifest.json", parents, config)


def check_equal(made, alone, tolerance=1e-4):
    one, other = several.curve(alone), several.curve(made)
    assert len(one) == len(other) > STEPS
    for expected, found in zip(one, other, strict=True):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), expected["step"]
    before, after = alone.data["objective"], made.data["objective"]
    assert after["after"] == pytest.approx(before["after"], abs=tolerance) and after["before"] == before["before"]
    first, second = (load_file(one.folder / "adapter_model.safetensors") for one in (alone, made))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 10 * tolerance


@pytest.mark.parametrize("method", sample("sft_v2", "dpo", "kto", "rm", "simpo", "grpo", "rloo", n=4))
def test_two_ranks_follow_the_losses_of_one_process(method, base, slices, tmp_path):
    alone = small_steps.run(step_of(method, base, slices, tmp_path / "one"))
    made = several.run(step_of(method, base, slices, tmp_path / "two"), 2)
    course = [row["reward" if "reward" in row else "loss"] for row in several.curve(alone) if "loss" in row]
    assert (
        len(course) == STEPS and max(course) - min(course) > 0.01 and alone.data["adapter_moved"] == 1
    )  # there is one to follow
    check_equal(made, alone)
