"""The losses of SFT and DPO as the steps train them, against values worked by hand from log-probabilities."""

import csv
import math

import numpy
import pytest
import torch

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import loading

BETA = 0.1


def stir(trainer):
    """Give the adapter a B that is not zero, so that policy and reference differ."""
    torch.manual_seed(7)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)


def log_probs(model, batch):
    """log p of each token given those before it, (B, T - 1), by numpy from a plain model's logits."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    x = logits[:, :-1].double().numpy()
    x = x - x.max(-1, keepdims=True)
    x = x - numpy.log(numpy.exp(x).sum(-1, keepdims=True))
    return numpy.take_along_axis(x, batch["input_ids"][:, 1:, None].numpy(), -1)[..., 0]


def plain_models(trainer, base, tmp_path):
    """(policy, reference) outside the trainer: the adapter's weights on a freshly loaded base, and that base."""
    from peft import PeftModel

    trainer.model.save_pretrained(tmp_path / "stirred")
    start = manifests.read(base)
    policy = PeftModel.from_pretrained(loading.load(start, tmp_path, "cpu", "fp32"), tmp_path / "stirred")
    return policy.eval(), loading.load(start, tmp_path, "cpu", "fp32").eval()


def test_dpo_losses_equal_those_worked_by_hand(base, pairs, tmp_path):
    def trained(loss_type):
        trainer = small_steps.built_trainer(tmp_path / loss_type, "dpo", base, pairs, loss_type=loss_type)
        stir(trainer)
        return trainer, trainer.data_collator([trainer.train_dataset[i] for i in range(6)])

    trainer, batch = trained("sigmoid")
    policy, reference = plain_models(trainer, base, tmp_path)
    mask = batch["completion_mask"][:, 1:].numpy()
    ratio = (log_probs(policy, batch) - log_probs(reference, batch)) * mask
    (chosen, rejected), (n_chosen, n_rejected) = numpy.split(ratio.sum(1), 2), numpy.split(mask.sum(1), 2)
    margin = chosen - rejected
    assert numpy.abs(margin).min() > 1e-3 and len(set(n_chosen - n_rejected)) > 1  # neither zero nor of one length
    wanted = {
        "sigmoid": numpy.log1p(numpy.exp(-BETA * margin)).mean(),
        "hinge": numpy.maximum(0, 1 - BETA * margin).mean(),
        "ipo": ((chosen / n_chosen - rejected / n_rejected - 1 / (2 * BETA)) ** 2).mean(),
    }
    assert trainer.args.beta == BETA
    for loss_type, value in wanted.items():
        trainer, batch = trained(loss_type)
        trainer.model.eval()
        with torch.no_grad():
            assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(value, rel=1e-5), loss_type


def test_the_reference_is_the_start_with_the_adapter_off_whether_computed_once_or_at_each_step(base, pairs, tmp_path):
    losses = []
    for once in (True, False):
        trainer = small_steps.built_trainer(tmp_path / str(once), "dpo", base, pairs, precompute_ref_log_probs=once)
        stir(trainer)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
        assert ("ref_chosen_logps" in batch) == once
        trainer.model.eval()
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.parametrize("loss_type, at_start", [("sigmoid", math.log(2)), ("ipo", 25.0), ("hinge", 1.0)])
def test_the_first_step_of_dpo_has_the_loss_of_a_zero_margin(base, pairs, tmp_path, loss_type, at_start):
    adapter = small_steps.train(tmp_path / "run", "dpo", base, pairs, loss_type=loss_type)
    with open(adapter.folder / "metrics.csv") as file:
        first = next(csv.DictReader(file))
    assert float(first["loss"]) == pytest.approx(at_start, rel=1e-5)
    assert adapter.data["objective"]["before"]["loss"] == pytest.approx(at_start, rel=1e-5)
    assert adapter.data["objective"]["before"]["margin"] == 0


@pytest.mark.parametrize("experiment", ["sft_v1", "sft_v2"])
def test_the_loss_of_sft_is_the_mean_over_the_tokens_that_have_a_label(base, slices, tmp_path, experiment):
    trainer = small_steps.built_trainer(tmp_path, experiment, base, slices[experiment], quantise="none")
    stir(trainer)
    policy, _ = plain_models(trainer, base, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    on = (batch["labels"][:, 1:] != -100).numpy()
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert loss == pytest.approx(-log_probs(policy, batch)[on].mean(), rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_dropout_acts_while_pairs_are_trained_on(base, pairs, tmp_path, method):
    trainer = small_steps.built_trainer(tmp_path, method, base, pairs)
    stir(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    trainer.model.train()
    one, two = (trainer.compute_loss(trainer.model, batch).item() for _ in range(2))
    assert one != two


@pytest.mark.parametrize("experiment", ["sft_v2", "dpo", "orpo"])
def test_an_effective_batch_of_16_is_one_step_whether_16_x_1_or_4_x_4(base, folder, tmp_path, experiment):
    """At dropout 0, since other micro-batches draw other dropout masks. Answers differ in length: a mean of means would show."""
    slice_ = (small_steps.sft_slice if experiment == "sft_v2" else small_steps.pairs_slice)(folder / "data")
    rows = []
    for size, steps in ((16, 1), (4, 4)):
        lora = small_steps.LORA | {"dropout": 0.0}
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "lora": lora}
        adapter = small_steps.train(tmp_path / str(size), experiment, base, slice_, **more)
        rows.append(list(csv.DictReader(open(adapter.folder / "metrics.csv")))[0])
    for key in ("loss", "grad_norm"):
        assert float(rows[0][key]) == pytest.approx(float(rows[1][key]), rel=1e-5)
