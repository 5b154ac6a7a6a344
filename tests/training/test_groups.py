"""The loss of a batch by groups of its rows: KTO's in groups of `kl_rows`, held-out pairs one by one."""

import pytest
import torch

from tests.support import small_steps
from workflow_scripts.training import trainers

PAIRS = ("dpo", "simpo")


def stirred(place, method, base, rows, **more):
    """A trainer whose adapter is not at its start, without dropout's draws."""
    built = small_steps.built_trainer(place, method, base, rows, quantise="none", **more)
    torch.manual_seed(7)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    built.model.eval()
    return built


def gradient(trainer, batches):
    """(losses, gradients after all of them, what was noted): as transformers sums micro-batches."""
    trainer.model.zero_grad()
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, dict(batch))
        (loss / len(batches)).backward()
        losses.append(loss.item())
    found = torch.cat([one.grad.reshape(-1) for one in trainer.model.parameters() if one.grad is not None])
    noted = {name: list(values) for name, values in trainer._metrics["eval"].items()}
    trainer._metrics["eval"].clear()
    return losses, found, noted


def mismatched(batch):
    """The token ids of each row of the KL estimate, without padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["KL_input_ids"], batch["KL_attention_mask"], strict=True)]


def count_passes(trainer, counted):
    return trainer.model.register_forward_hook(lambda model, args, output: counted.append(1))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_batch_of_groups_is_as_many_micro_batches_of_kto(folder, base, pairs, loss_type):
    more = {"kl_rows": 4, "loss_type": loss_type}
    whole = stirred(folder / f"{loss_type} 12", "kto", base, pairs, per_device_train_batch_size=12, **more)
    small = stirred(folder / f"{loss_type} 4", "kto", base, pairs, per_device_train_batch_size=4, **more)
    together, apart = next(iter(whole.get_train_dataloader())), list(small.get_train_dataloader())[:3]
    if loss_type == "kto":
        assert mismatched(together) == [ids for one in apart for ids in mismatched(one)]
    passes: list = []
    hook = count_passes(whole, passes)
    losses, found, noted = gradient(whole, [together])
    hook.remove()
    wanted_losses, wanted, wanted_noted = gradient(small, apart)
    assert len(passes) == (2 if loss_type == "kto" else 1)
    assert len(set(wanted_losses)) == 3, "micro-batches that are all alike show nothing"
    assert losses[0] == pytest.approx(sum(wanted_losses) / 3, rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for name in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "entropy"):
        assert noted[name] == pytest.approx(wanted_noted[name], rel=1e-4, abs=1e-6), name


def test_one_group_as_large_as_the_batch_is_another_method(folder, base, pairs):
    """So that the test above could fail: the reference point of 12 rows is not the mean of those of 4."""
    small = stirred(folder / "of 4", "kto", base, pairs, per_device_train_batch_size=12, kl_rows=4)
    large = stirred(folder / "of 12", "kto", base, pairs, per_device_train_batch_size=12, kl_rows="micro_batch")
    assert (small.kl_rows, large.kl_rows) == (4, 12)
    first, second = (gradient(one, [next(iter(one.get_train_dataloader()))])[2]["kl"] for one in (small, large))
    assert len(first) == 3 and len(second) == 1 and sum(first) / 3 != pytest.approx(second[0], rel=1e-2)


@pytest.mark.parametrize("method", [*PAIRS, "kto"])
def test_the_held_out_objective_does_not_depend_on_the_batch(folder, base, pairs, method):
    """Values, and each unit's: pairs one by one; KTO by groups of four, of which a batch of six takes one."""
    keys = {"loss": "loss"} | ({} if method == "kto" else {"accuracy": "rewards/accuracies", "margin": "rewards/margins"})
    more = {"per_device_train_batch_size": 4} | ({"kl_rows": 4} if method == "kto" else {})
    found, passes = {}, {}
    for size in (1, 6, 8):
        one = stirred(folder / f"{method} by {size}", method, base, pairs, per_device_eval_batch_size=size, **more)
        passes[size] = []
        hook = count_passes(one, passes[size])
        found[size] = trainers.objective(one, keys)
        hook.remove()
        assert one.judged is None and one.args.per_device_eval_batch_size == size
    units = len(found[1][1]["loss"])
    assert units == (4 if method == "kto" else 8) and len(set(found[1][1]["loss"])) > 1
    for size in (6, 8):
        for name, value in found[1][0].items():
            assert found[size][0][name] == pytest.approx(value, rel=1e-4, abs=2e-6)
            assert found[size][1][name] == pytest.approx(found[1][1][name], rel=1e-3, abs=1e-5)
    assert len(passes[8]) < len(passes[1])


def test_a_last_group_of_fewer_rows_weighs_by_them(folder, base, pairs):
    """16 held-out answers in groups of six: 6, 6 and 4."""
    one = stirred(folder / "six", "kto", base, pairs, per_device_train_batch_size=6, per_device_eval_batch_size=12)
    losses = []
    for batch in one.get_eval_dataloader():
        for first in range(0, len(batch["label"]), 6):
            part = {name: value[first : first + 6] for name, value in batch.items()}
            with torch.no_grad():
                losses.append((one.compute_loss(one.model, part).item(), len(part["label"])))
    assert [rows for _, rows in losses] == [6, 6, 4]
    wanted = sum(loss * rows for loss, rows in losses) / 16
    assert trainers.objective(one, {"loss": "loss"})[0]["loss"] == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("method, passes", [("dpo", 2), ("kto", 4)])
def test_a_reference_that_is_not_there_yet_is_computed_for_the_whole_batch(folder, base, pairs, method, passes):
    """DPO: policy and reference of held-out pairs, which count one by one; KTO: both, and both of the mismatched answers."""
    more = {"per_device_train_batch_size": 12, "per_device_eval_batch_size": 12, **({"kl_rows": 4} if method == "kto" else {})}
    found = {}
    for once in (True, False):
        one = stirred(folder / f"{method} once {once}", method, base, pairs, precompute_ref_log_probs=once, **more)
        one.judged, counted = [], []
        batch = next(iter(one.get_eval_dataloader()))
        hook = count_passes(one, counted)
        with torch.no_grad():
            one.compute_loss(one.model, batch)
        hook.remove()
        found[once] = one.judged
        assert one.precompute_ref_logps == once and len(counted) == (passes // 2 if once else passes)
    assert len(found[True]) == (8 if method == "dpo" else 3)
    for first, second in zip(found[True], found[False], strict=True):
        assert first == pytest.approx(second, rel=1e-4)
