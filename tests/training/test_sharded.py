"""A base whose weights lie in parts on the ranks trains what a whole one trains."""

import importlib
import json
import os

import pytest

from tests.support import several, small_steps
from tests.support.right_way import sample
from tests.training.test_over_ranks import check_equal, step_of
from tests.training.test_resume import end_at
from workflow_scripts.plumbing import ranks
from workflow_scripts.plumbing.messages import Interrupted
from workflow_scripts.steps import train_sft
from workflow_scripts.training import speed, trainers


def sharded_step(method, base, slices, out, **more):
    """Of a base in full precision, which is what is shared out."""
    job = step_of(method, base, slices, out, **{"quantise": "none"} | more)
    job.shard = True
    return job


BY_TWO = sample("dpo", "sft_v2", "kto", "rm", "simpo", "cpo", "orpo", n=2)


@pytest.mark.parametrize("method", BY_TWO)
def test_two_ranks_with_a_part_of_the_base_each_follow_the_losses_of_one_process(method, base, slices, tmp_path):
    alone = small_steps.run(step_of(method, base, slices, tmp_path / "one", quantise="none"))
    made = several.run(sharded_step(method, base, slices, tmp_path / "two"), 2)
    assert alone.data["adapter_moved"] == 1
    check_equal(made, alone)
    info = json.loads((made.folder / "run.json").read_text())
    assert (info["gpus"], info["shard"]) == (2, True)


@pytest.mark.long
@pytest.mark.parametrize("method", ["sft_v2", "dpo"])
def test_four_ranks_with_a_part_of_the_base_each_follow_the_losses_of_one_process(method, base, slices, tmp_path):
    alone = small_steps.run(step_of(method, base, slices, tmp_path / "one", quantise="none"))
    check_equal(several.run(sharded_step(method, base, slices, tmp_path / "four"), 4), alone)


@pytest.mark.parametrize("recomputed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_batches_that_are_no_multiple_of_the_ranks_and_layers_that_are_recomputed(recomputed, base, slices, tmp_path):
    """32 rows in batches of 5 and 8 held-out ones for three ranks: the last batches are computed by all, and counted once."""
    more = {"max_steps": 3, "gradient_accumulation_steps": 3, "per_device_eval_batch_size": 5}
    more["gradient_checkpointing"] = recomputed
    alone = small_steps.run(step_of("dpo", base, slices, tmp_path / "one", quantise="none", **more))
    made = several.run(sharded_step("dpo", base, slices, tmp_path / "three", **more), 3)
    check_equal(made, alone, steps=3)
    for name, change in alone.data["objective"]["change"].items():
        assert made.data["objective"]["change"][name] == pytest.approx(change, abs=1e-4)


@pytest.mark.long
def test_an_epoch_that_ends_within_a_step_of_four_ranks(base, slices, tmp_path):
    """Six micro-batches: of the second step two ranks have none."""
    more = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 6}
    alone = small_steps.run(step_of("dpo", base, slices, tmp_path / "one", quantise="none", **more))
    check_equal(several.run(sharded_step("dpo", base, slices, tmp_path / "four", **more), 4), alone, steps=2)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_padding_and_in_16_bits(precision, base, slices, tmp_path, monkeypatch):
    """As on a GPU, where batches go through the decoder without their padding, under autocast."""
    monkeypatch.setattr(speed, "hinders_unpadding", lambda model, step: None)

    def step(shard):
        job = sharded_step("dpo", base, slices, tmp_path / f"in parts {shard}", max_steps=6)
        job.shard, job.speed = shard, {"unpadded": True}
        job.step["precision"] = precision
        return job

    whole, made = several.run(step(False), 2), several.run(step(True), 2)
    check_equal(made, whole, steps=6)
    assert json.loads((made.folder / "run.json").read_text())["speed"]["unpadded"]


@pytest.mark.parametrize("method", BY_TWO)
def test_an_epoch_that_ends_within_a_step(method, base, slices, tmp_path):
    """Three micro-batches an epoch, two a step: of the second step a rank has none, and is in the pass all the same."""
    more = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 24 if method == "kto" else 12}
    alone = small_steps.run(step_of(method, base, slices, tmp_path / "one", quantise="none", **more))
    check_equal(several.run(sharded_step(method, base, slices, tmp_path / "two", **more), 2), alone, steps=4)


def test_a_rank_keeps_its_part_of_each_layer_and_all_of_the_adapter(base, slices, tmp_path):
    def train(rank):
        kept = []

        def on_train_end(self, args, state, control, **kwargs):
            sizes = {True: 0, False: 0}  # of what is trained, and of the base's layers
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.requires_grad or ".layers." in name:
                    mine = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                    sizes[parameter.requires_grad] += mine.numel()
            kept.append([sizes[True], sizes[False]])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainers.Watch, "on_train_end", on_train_end)
            job = sharded_step("sft_v2", base, slices, tmp_path / f"of {ranks.count}", max_steps=1)
            train_sft.main(job)
        (tmp_path / f"{ranks.count}-{rank}").write_text(json.dumps(kept[0]))

    for count in (1, 2):
        assert several.together(count, train) == [0] * count
    whole, *parts = [json.loads((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1")]
    assert all(trained == whole[0] for trained, _ in parts) and [frozen for _, frozen in parts] == [whole[1] / 2] * 2


def test_who_loses_another_rank_in_the_middle_of_a_pass_says_that_it_lost_it(base, slices, tmp_path):
    def train(rank):
        def on_step_begin(self, args, state, control, **kwargs):
            if rank == 1 and state.global_step == 1:
                layer = kwargs["model"].base_model.base_model.layers[1]
                layer.register_forward_pre_hook(lambda *_: os._exit(3))

        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as caught:
            patch.setattr(trainers.Watch, "on_step_begin", on_step_begin, raising=False)
            train_sft.main(sharded_step("sft_v2", base, slices, tmp_path / "run", max_steps=4))
        assert ranks.is_loss(caught.value) and not isinstance(caught.value, ranks.Lost)

    assert several.together(2, train) == [0, 3]


def test_a_checkpoint_goes_on_with_the_base_whole_and_in_parts(base, slices, tmp_path, capfd):
    settings = {"max_steps": 9, "quantise": "none", "dropout": 0.1}
    job = step_of("sft_v2", base, slices, tmp_path / "run", **settings)

    def ended_at(step, shard):
        def train(rank):
            job.shard = shard
            with pytest.MonkeyPatch.context() as patch:
                if rank == 1:
                    end_at(step, patch)
                with pytest.raises(Interrupted, match=f"SIGTERM at step {step + 1} of 9, with a checkpoint"):
                    train_sft.main(job)

        return train

    assert several.together(2, ended_at(2, shard=True)) == [0, 0]
    assert several.together(2, ended_at(5, shard=False)) == [0, 0]
    assert "resumed at step 3 of 9" in capfd.readouterr().out
    job.shard = True
    made = several.run(job, 2)
    assert "resumed at step 6 of 9" in capfd.readouterr().out
    check_equal(made, several.run(step_of("sft_v2", base, slices, tmp_path / "undisturbed", **settings), 2), steps=9)


@pytest.mark.parametrize(
    ("method", "quantise", "says"),
    [
        ("sft_v2", "nf4", "--shard: a base in 4-bit is not shared out; set quantise: none, or leave shard away"),
        ("grpo", "none", "--shard: grpo draws answers with the weights of the whole base; leave it away"),
    ],
)
def test_by_hand_what_does_not_go_is_said_in_one_line(method, quantise, says, base, slices, tmp_path, capfd):
    job = sharded_step(method, base, slices, tmp_path / "run", quantise=quantise)
    main = importlib.import_module(f"workflow_scripts.steps.{job.step['step']}").main
    assert several.together(2, lambda rank: main(job)) == [1, 1]
    assert says in capfd.readouterr().err
