"""A training by several ranks is that of one process: same losses, figures, objective and weights, up to the order of sums."""

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from tests.support import several, small_steps
from tests.support.right_way import sample
from tests.training.test_resume import end_at
from workflow_scripts.plumbing.messages import Interrupted
from workflow_scripts.steps import train_sft
from workflow_scripts.training import over_ranks, trainers

STEPS = 30
SHARED = {"max_steps": STEPS, "gradient_accumulation_steps": 4, "logging_steps": 1}
OF_METHOD = {
    "sft_v2": {"per_device_train_batch_size": 2},
    # held-out batches of three pairs, and of three groups of four answers: the last is not whole
    "dpo": {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3},
    **dict.fromkeys(("simpo", "cpo", "orpo"), {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}),
    "kto": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 12},
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


def check_equal(made, alone, tolerance=1e-4, steps=STEPS):
    one, other = several.curve(alone), several.curve(made)
    assert len(one) == len(other) > steps
    for expected, found in zip(one, other, strict=True):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), expected["step"]
    before, after = alone.data["objective"], made.data["objective"]
    assert after["after"] == pytest.approx(before["after"], abs=tolerance) and after["before"] == before["before"]
    for name, moved in before["change"].items():
        assert after["change"][name] == pytest.approx(moved, abs=tolerance), name
    first, second = (load_file(one.folder / "adapter_model.safetensors") for one in (alone, made))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 10 * tolerance


@pytest.mark.parametrize("method", sample("sft_v2", "dpo", "kto", "rm", "simpo", "cpo", "orpo", "grpo", "rloo", n=2))
def test_two_ranks_follow_the_losses_of_one_process(method, base, slices, tmp_path):
    alone = small_steps.run(step_of(method, base, slices, tmp_path / "one"))
    made = several.run(step_of(method, base, slices, tmp_path / "two"), 2)
    course = [row["reward" if "reward" in row else "loss"] for row in several.curve(alone) if "loss" in row]
    assert (
        len(course) == STEPS and max(course) - min(course) > 0.01 and alone.data["adapter_moved"] == 1
    )  # there is one to follow
    check_equal(made, alone)


def test_two_ranks_share_a_rollout_and_have_the_rewards_of_one_process(base, slices, tmp_path):
    alone = small_steps.run(step_of("grpo", base, slices, tmp_path / "one", max_steps=3))
    made = several.run(step_of("grpo", base, slices, tmp_path / "two", max_steps=3), 2)
    assert len({row["reward"] for row in several.curve(alone) if "reward" in row}) > 1
    check_equal(made, alone, steps=3)


@pytest.mark.long
@pytest.mark.parametrize("method", ["sft_v2", "dpo"])
def test_four_ranks_follow_the_losses_of_one_process(method, base, slices, tmp_path):
    alone = small_steps.run(step_of(method, base, slices, tmp_path / "one"))
    check_equal(several.run(step_of(method, base, slices, tmp_path / "four"), 4), alone)


def test_a_checkpoint_of_two_ranks_goes_on_with_four_and_with_one(base, slices, tmp_path, capfd):
    """A signal reaches one rank, and all save at the same step. With dropout: two ranks and four have the same masks."""
    settings = {"max_steps": 9, "dropout": 0.1}
    job = step_of("sft_v2", base, slices, tmp_path / "run", **settings)

    def ended_at(step, of):
        def train(rank):
            with pytest.MonkeyPatch.context() as patch:
                if rank == of - 1:
                    end_at(step, patch)
                with pytest.raises(Interrupted, match=f"SIGTERM at step {step + 1} of 9, with a checkpoint"):
                    train_sft.main(job)

        return train

    assert several.together(2, ended_at(2, 2)) == [0, 0]
    assert several.together(4, ended_at(5, 4)) == [0] * 4
    assert "resumed at step 3 of 9" in capfd.readouterr().out
    shutil.copytree(job.work, tmp_path / "kept")
    made = several.run(job, 2)
    assert "resumed at step 6 of 9" in capfd.readouterr().out
    check_equal(made, several.run(step_of("sft_v2", base, slices, tmp_path / "undisturbed", **settings), 2), steps=9)
    shutil.rmtree(job.work)
    shutil.copytree(tmp_path / "kept", job.work)
    small_steps.run(job)
    assert "resumed at step 6 of 9" in capfd.readouterr().out


def test_dropout_draws_other_masks_for_each_micro_batch(base, slices, tmp_path):
    """Ranks start from one seed: drawn from that alone, both of a step's micro-batches would lose the same units."""
    draws = []

    def train(rank):
        with pytest.MonkeyPatch.context() as patch:
            inner = over_ranks.Shared._computed

            def computed(self, model, inputs, items):
                self.inner = lambda *given: draws.append(torch.rand(()).item()) or torch.zeros(())
                return inner(self, model, inputs, items)

            patch.setattr(over_ranks.Shared, "_computed", computed)
            train_sft.main(step_of("sft_v2", base, slices, tmp_path / "run", max_steps=2))
        (tmp_path / f"draws{rank}").write_text(json.dumps(draws))

    assert several.together(2, train) == [0, 0]
    found = [json.loads((tmp_path / f"draws{rank}").read_text()) for rank in (0, 1)]
    assert [len(one) for one in found] == [4, 4] and len({*found[0], *found[1]}) == 8


def test_weights_that_have_moved_apart_are_no_adapter(base, slices, tmp_path, capfd):
    def train(rank):
        def moved(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 2:
                next(p for p in kwargs["model"].parameters() if p.requires_grad).data.add_(1e-3)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainers.Watch, "on_step_begin", moved, raising=False)
            train_sft.main(step_of("sft_v2", base, slices, tmp_path / "run", max_steps=4))

    assert several.together(2, train) == [1, 1]
    assert "the adapters of the ranks have moved apart, from rank 0 rank 1 by 0.0" in capfd.readouterr().err


def test_by_hand_what_does_not_go_is_said_in_one_line(base, slices, tmp_path, capfd):
    assert several.together(
        2, lambda rank: train_sft.main(step_of("sft_v2", base, slices, tmp_path / "run", gradient_accumulation_steps=3))
    ) == [1, 1]
    assert "gpus: 2 ranks share 3 micro-batches of a step (gradient_accumulation_steps) unevenly" in capfd.readouterr().err


@pytest.mark.parametrize("method", sample("dpo", "kto", "rm"))
def test_what_needs_no_gradient_is_shared_too(method, base, slices, tmp_path):
    """The reference and the held-out rows: each batch goes through the model of one rank alone."""

    def passes(place, of):
        job = step_of(method, base, slices, place, max_steps=1, per_device_eval_batch_size=1 if method == "dpo" else 2)
        main = importlib.import_module(f"workflow_scripts.steps.{job.step['step']}").main

        def train(rank):
            count = [0]
            with pytest.MonkeyPatch.context() as patch:
                forward = Qwen2Model.forward

                def counted(self, *args, **kwargs):
                    count[0] += not torch.is_grad_enabled()
                    return forward(self, *args, **kwargs)

                patch.setattr(Qwen2Model, "forward", counted)
                main(job)
            (place / f"passes{rank}").write_text(str(count[0]))

        assert several.together(of, train) == [0] * of
        return [int((place / f"passes{rank}").read_text()) for rank in range(of)]

    alone, shared = passes(tmp_path / "one", 1)[0], passes(tmp_path / "two", 2)
    assert max(shared) < 0.65 * alone and alone > 7
