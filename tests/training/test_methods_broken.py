"""A method that is broken on purpose must be seen: the right way moves its own held-out objective, the broken one does not.

Real trainings of a small pretrained model. Held-out rows are always the right ones: only what is trained on is broken.
"""

import math

import pytest
import torch

from tests.models.test_chat import END_OUTSIDE
from tests.support import small_steps
from tests.support.right_way import HELDOUT, KIND, ROLLOUTS, ROWS, sample
from workflow_scripts.models import chat, lora
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import rewards


@pytest.fixture(scope="module")
def base(speaking_base):
    return speaking_base


def rows_for(method, folder):
    made = {"sft_v2": small_steps.sft_slice} | dict.fromkeys(ROLLOUTS, small_steps.instructions_slice)
    return made.get(method, small_steps.pairs_slice)(folder / "data")


def swapped(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def flipped_pairs(method, folder):
    """The pairs of the right way, but for the held-out ones with their sides swapped."""
    rows, kept = ROWS[KIND[method]](), HELDOUT[KIND[method]]
    return small_steps.write_slice(folder / "data", "flipped", [*map(swapped, rows[:-kept]), *rows[-kept:]], kept)


# -- labels flipped ---------------------------------------------------------------------------------------------------


@pytest.mark.trained
@pytest.mark.parametrize("method", sample("dpo", "kto", "rm"))
def test_flipped_labels_move_the_objective_the_other_way(right_way, method, tmp_path, figure):
    right = right_way(method).data["objective"]
    flipped = right_way.train(tmp_path, method, flipped_pairs(method, tmp_path)).data["objective"]
    assert right["before"] == flipped["before"]
    start = right["before"]["loss"]
    assert start == pytest.approx({"dpo": math.log(2), "kto": 0.5, "rm": math.log(2)}[method], abs=0.03)
    # Loss and margin of an adapter that learns nothing are those of the start, to the last bit but one.
    figure("loss over that of the start", right["after"]["loss"] / start, at_most=0.97)
    figure("loss over that of the start, labels flipped", flipped["after"]["loss"] / start, at_least=1.03)
    figure("margin", right["after"]["margin"], at_least=0.08)
    figure("margin, labels flipped", flipped["after"]["margin"], at_most=-0.08)
    figure("accuracy", right["after"]["accuracy"], at_least=0.65)
    figure("accuracy, labels flipped", flipped["after"]["accuracy"], at_most=0.42)


@pytest.mark.trained
@pytest.mark.parametrize("method", sample("simpo", "orpo", "cpo"))
def test_flipped_labels_move_the_margin_the_other_way_without_a_reference(right_way, method, tmp_path, figure):
    """Pairs are ordered before training, by their likelihood: what there is to see is by how much that moves."""
    right = right_way(method).data["objective"]
    flipped = right_way.train(tmp_path, method, flip_labels=True).data["objective"]
    assert right["before"] == flipped["before"]
    for name, one, least in (("labels right", right, 0.1), ("labels flipped", flipped, -0.1)):
        moved = one["change"]["margin"]["mean"]
        figure(f"margin, {name}", moved, **({"at_least": least} if least > 0 else {"at_most": least}))
        assert abs(moved) > 4 * one["change"]["margin"]["stderr"]
    figure("loss, labels right", right["after"]["loss"] - right["before"]["loss"], at_most=-0.02)


# -- reward negated ---------------------------------------------------------------------------------------------------


@pytest.mark.trained
@pytest.mark.parametrize("method", sample("grpo", "rloo", "ppo_ifeval"))
def test_a_negated_reward_is_seen_in_the_held_out_reward(right_way, method, tmp_path, monkeypatch, figure):
    right, real = right_way(method).data["objective"], rewards.functions

    def functions(job, parents, on_backbone=None):
        true = real(job, parents)["ifeval"]

        def ifeval(*args, **columns):
            return [-reward for reward in true(*args, **columns)]

        return {"ifeval": ifeval}

    monkeypatch.setattr(rewards, "functions", functions)
    negated = right_way.train(tmp_path, method).data["objective"]
    for one in (right, negated):
        assert one["before"]["reward"] == one["before"]["ifeval"] and one["after"]["reward"] == one["after"]["ifeval"]
    before = right["before"]["reward"]
    assert -negated["before"]["reward"] == before
    figure("what there is to win or lose", before, at_least=0.05)
    figure("won", right["after"]["reward"] - before, at_least=0.18)
    figure("won, reward negated", -negated["after"]["reward"] - before, at_most=-0.03)


@pytest.mark.long
@pytest.mark.trained
def test_a_constant_reward_moves_nothing_but_the_kl_in_ppo(right_way, tmp_path, monkeypatch, figure):
    """What is left is noise: the whitened error of a value function that has nothing to learn, and the pull to the reference."""
    from workflow_scripts.rl.ppo_trainer import PPOTrainer

    right, real = right_way("ppo_ifeval").data["objective"], PPOTrainer._calculate_rewards

    def constant(self, *args):
        found = real(self, *args)
        if self.model.training:  # held-out answers are judged as ever
            self.scores = torch.ones_like(self.scores)
        return found

    monkeypatch.setattr(PPOTrainer, "_calculate_rewards", constant)
    made = right_way.train(tmp_path, "ppo_ifeval").data["objective"]
    before = right["before"]["reward"]
    assert made["before"]["reward"] == before
    figure("won", right["after"]["reward"] - before, at_least=0.18)
    figure("won, reward constant", made["after"]["reward"] - before, at_least=-0.25, at_most=0.25)


# -- mask off ---------------------------------------------------------------------------------------------------------


def test_sft_on_a_template_whose_mask_leaves_out_the_end_of_turn_stops(base, folder, tmp_path):
    rows = rows_for("sft_v2", tmp_path)
    assert small_steps.train(tmp_path / "right", "sft_v2", base, rows).data["adapter_moved"] == 1
    broken = small_steps.copy_base(base, tmp_path / "broken", END_OUTSIDE)
    with pytest.raises(InputError, match=r"does not train the end-of-turn token .*close its generation span after"):
        small_steps.train(tmp_path / "run", "sft_v2", broken, rows)


@pytest.mark.parametrize("method", ["sft_v2", "dpo", "simpo", "kto", "rm", *ROLLOUTS])
def test_a_template_without_an_end_of_turn_stops_every_method(base, tmp_path, method):
    rows = rows_for(method, tmp_path)
    closed = END_OUTSIDE[0]
    broken = small_steps.copy_base(base, tmp_path / "broken", (closed, closed.replace(" + '<|im_end|>'", "")))
    with pytest.raises(InputError, match=r"the end-of-sequence token is '<\|im_end\|>'; generation would not stop there"):
        small_steps.train(tmp_path / "run", method, broken, rows)


@pytest.mark.parametrize("off, says", [("all", "no token with a loss"), ("end", "does not train the end-of-turn token")])
@pytest.mark.parametrize("method", ["sft_v2", "dpo", "simpo", "kto"])
def test_a_mask_that_is_off_stops_the_training(base, tmp_path, monkeypatch, method, off, says):
    """Whatever spoils the collator's mask, the first batch does not pass."""

    class Spoilt(chat.MaskCheck):
        def __init__(self, collator, end_id, max_length):
            super().__init__(lambda rows: self.spoil(collator(rows)), end_id, max_length)

        def spoil(self, batch):
            name, empty = ("completion_mask", 0) if "completion_mask" in batch else ("labels", chat.IGNORE)
            where = batch[name] != empty if off == "all" else batch["input_ids"] == self.end_id
            batch[name] = batch[name].masked_fill(where, empty)
            return batch

    monkeypatch.setattr(chat, "MaskCheck", Spoilt)
    with pytest.raises(InputError, match=says):
        small_steps.train(tmp_path / "run", method, base, rows_for(method, tmp_path))


# -- adapter frozen ---------------------------------------------------------------------------------------------------


def short(method):
    """Two steps, from 32 rows or prompts."""
    more = {"max_completion_length": 24} if method in ROLLOUTS else {}
    more |= {"steps_per_generation": 2} if method == "ppo_ifeval" else {}
    return {"max_steps": 2, "per_device_train_batch_size": 16} | more


def settle_then(monkeypatch, spoil):
    """Let the steps settle their adapter as always, and then `spoil` the trainer's model."""
    right = lora.settle

    def settle(trainer, seed):
        right(trainer, seed)
        spoil(trainer.model)

    monkeypatch.setattr(lora, "settle", settle)


@pytest.mark.parametrize("method", sample("kto", "ppo_ifeval", "rm", "simpo", "grpo", "rloo", n=2))
def test_an_adapter_that_gets_no_gradient_is_seen_in_the_manifest(base, tmp_path, monkeypatch, method):
    rows = rows_for(method, tmp_path)
    more = short(method)
    right = small_steps.train(tmp_path / "right", method, base, rows, **more)
    assert right.data["adapter_moved"] == 1

    def stop_gradients(model):
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)  # still said to be trainable

    settle_then(monkeypatch, stop_gradients)
    frozen = small_steps.train(tmp_path / "frozen", method, base, rows, **more)
    assert frozen.data["adapter_moved"] == 0
    if method == "kto":
        assert frozen.data["objective"]["after"] == frozen.data["objective"]["before"] != right.data["objective"]["after"]


@pytest.mark.parametrize("method", ["kto", "simpo", "rm", *ROLLOUTS])
def test_an_adapter_that_is_switched_off_stops_before_training(base, tmp_path, monkeypatch, method):
    settle_then(monkeypatch, lambda model: model.requires_grad_(False))
    with pytest.raises(AssertionError, match="nothing is trainable"):
        small_steps.train(tmp_path / "run", method, base, rows_for(method, tmp_path), **short(method))


@pytest.mark.parametrize("method, dropout", [("kto", 0.0), ("simpo", 0.0), ("rm", 0.0), *((one, 0.05) for one in ROLLOUTS)])
def test_dropout_that_is_not_the_declared_one_stops_before_training(base, tmp_path, monkeypatch, method, dropout):
    def turn(model):
        for name, module in model.named_modules():
            if "lora_dropout" in name and hasattr(module, "p"):
                module.p = dropout

    rows = rows_for(method, tmp_path)
    settle_then(monkeypatch, turn)
    with pytest.raises(AssertionError, match="LoRA dropout"):
        small_steps.train(tmp_path / "run", method, base, rows, **short(method))
