"""The losses of KTO and of the reward model as the steps train them, and where a reward is read, against values worked by hand.

By hand: each sequence alone, without padding, through a plainly loaded model, and the rest by numpy.
"""

import csv
import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.data import unpaired
from workflow_scripts.models import chat, loading
from workflow_scripts.rl import reward_model
from workflow_scripts.steps import train_kto

BETA = 0.1
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def tokenizer(base):
    return chat.tokenizer_of(manifests.read(base))


@pytest.fixture(scope="module")
def unbalanced(folder):
    return small_steps.unpaired_slice(folder / "data", desirable=24, undesirable=8)


def stir(trainer, seed=7):
    """Give the adapter a B that is not zero, so that policy and reference differ."""
    torch.manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)


def plain_models(trainer, base, place, reward=False):
    """(policy, reference) outside the trainer: the adapter's weights on a freshly loaded base, and that base."""
    from peft import PeftModel

    trainer.model.save_pretrained(place)
    start = manifests.read(base)
    reference, bare = (loading.load(start, place, "cpu", "fp32", reward=reward) for _ in range(2))
    return PeftModel.from_pretrained(bare, place).eval(), reference.eval()


def ids_of(tokenizer, turns, **more):
    return tokenizer.apply_chat_template(turns, **more)["input_ids"]


# -- KTO --------------------------------------------------------------------------------------------------------------


def prompt_and_answer(tokenizer, row):
    """(ids of the prompt up to where the answer begins, ids of the answer)."""
    prompt = ids_of(tokenizer, row["prompt"], add_generation_prompt=True)
    whole = ids_of(tokenizer, row["prompt"] + row["completion"])
    assert whole[: len(prompt)] == prompt
    return prompt, whole[len(prompt) :]


def log_prob(model, prompt, answer):
    """log p(answer | prompt), summed over the answer's tokens."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        x = model(ids).logits[0, :-1].double().numpy()
    x = x - x.max(-1, keepdims=True)
    x = x - numpy.log(numpy.exp(x).sum(-1, keepdims=True))
    return numpy.take_along_axis(x, ids[0, 1:, None].numpy(), -1)[len(prompt) - 1 :, 0].sum()


def sigmoid(x):
    return 1 / (1 + numpy.exp(-numpy.asarray(x)))


def kto_trainer(place, base, rows, **more):
    sizes = {"per_device_train_batch_size": 6, "quantise": "none"}
    return small_steps.built_trainer(place, "kto", base, rows, **sizes, **more)


def batches_of(trainer, rows, size=6):
    """(what the trainer is fed, the rows that these are) for each full batch of its first epoch."""
    ordered, _ = unpaired.spread(unpaired.unpair(manifests.read(rows).rows(heldout=False)), size, trainer.args.seed)
    fed = list(trainer.get_train_dataloader())
    return [(batch, ordered[i * size : (i + 1) * size]) for i, batch in enumerate(fed) if len(batch["label"]) == size]


def uneven(trainer, rows):
    """A batch with more of one class than of the other: where they are as many, a wrong z hardly shows in the loss."""
    return next(one for one in batches_of(trainer, rows) if sum(row["label"] for row in one[1]) in (1, 2, 4, 5))


def worked(tokenizer, policy, reference, rows):
    """(r, the mean log-ratio of the mismatched answers) of a batch: of row i that of row i - 1, of the first the last one's."""
    parts = [prompt_and_answer(tokenizer, row) for row in rows]

    def ratio(prompt, answer):
        return log_prob(policy, prompt, answer) - log_prob(reference, prompt, answer)

    own = numpy.array([ratio(*part) for part in parts])
    others = numpy.mean([ratio(parts[i][0], parts[i - 1][1]) for i in range(len(parts))])
    return own, others


@pytest.fixture(scope="module")
def kto(folder, base, pairs, tokenizer):
    """(trainer, batch, r, labels, mean log-ratio of the mismatched answers), one batch where that mean is positive, one negative.

    The stirring is searched for: what random weights do to the mean is chance.
    """
    trainer = kto_trainer(folder / "kto", base, pairs)
    batch, rows = uneven(trainer, pairs)
    found = {}
    for seed in range(40):
        stir(trainer, seed)
        policy, reference = plain_models(trainer, base, folder / f"kto stirred {seed}")
        own, others = worked(tokenizer, policy, reference, rows)
        if abs(others) > 0.3:
            labels = numpy.array([row["label"] for row in rows])
            found.setdefault("above" if others > 0 else "below", (seed, batch, own, labels, others))
        if len(found) == 2:
            return trainer, found
    raise AssertionError(f"no stirring with a positive and a negative estimate: {list(found)}")


def loss_of(trainer, batch):
    trainer.model.eval()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch)).item()


@pytest.mark.parametrize("side", ["above", "below"])
def test_the_loss_of_kto_equals_the_one_worked_by_hand_with_z_clamped_at_zero(kto, side):
    trainer, found = kto
    seed, batch, r, labels, others = found[side]
    stir(trainer, seed)
    z = max(others, 0)
    assert numpy.abs(r).min() > 1e-3

    def by_hand(z):
        return numpy.where(labels, 1 - sigmoid(BETA * (r - z)), 1 - sigmoid(BETA * (z - r))).mean()

    assert trainer.args.beta == BETA and trainer.desirable_weight == trainer.undesirable_weight == 1
    assert loss_of(trainer, batch) == pytest.approx(by_hand(z), rel=1e-5)
    # Another reference point would show: none at all, or one that is not clamped.
    assert abs(by_hand(z) - by_hand(0 if others > 0 else others)) > 1e-3
    assert trainer._metrics["eval"]["kl"][-1] == pytest.approx(z, rel=1e-4, abs=1e-9)


def test_the_kl_pairs_are_the_answers_of_the_row_before_within_the_batch_and_never_the_own_one(base, pairs, tokenizer, tmp_path):
    trainer = kto_trainer(tmp_path, base, pairs)
    batches = batches_of(trainer, pairs)
    assert len(batches) == 10  # 64 answers of 32 pairs, and four left over
    for batch, rows in batches:
        parts = [prompt_and_answer(tokenizer, row) for row in rows]
        assert len({json.dumps(row["prompt"]) for row in rows}) == 6  # so that a mismatched answer is one to another prompt
        for i, (prompt, answer) in enumerate(parts):
            kept = batch["KL_attention_mask"][i].bool()
            assert batch["KL_input_ids"][i][kept].tolist() == prompt + parts[i - 1][1]
            assert batch["KL_input_ids"][i][batch["KL_completion_mask"][i].bool()].tolist() == parts[i - 1][1]
            kept = batch["attention_mask"][i].bool()
            assert batch["input_ids"][i][kept].tolist() == prompt + answer
            assert batch["input_ids"][i][batch["completion_mask"][i].bool()].tolist() == answer
        assert batch["label"].tolist() == [row["label"] for row in rows]


@pytest.mark.parametrize("class_weights, w_d, w_u", [("ratio", 1, 3), ({"desirable": 0.5, "undesirable": 2.0}, 0.5, 2)])
def test_each_class_has_its_weight_on_an_unbalanced_slice(base, unbalanced, tokenizer, tmp_path, class_weights, w_d, w_u):
    trainer = kto_trainer(tmp_path / "run", base, unbalanced, class_weights=class_weights)
    assert (trainer.desirable_weight, trainer.undesirable_weight) == (w_d, w_u)
    stir(trainer)
    policy, reference = plain_models(trainer, base, tmp_path / "stirred")
    batch, rows = uneven(trainer, unbalanced)
    r, others = worked(tokenizer, policy, reference, rows)
    z, labels = max(others, 0), numpy.array([row["label"] for row in rows])
    wanted = numpy.where(labels, w_d * (1 - sigmoid(BETA * (r - z))), w_u * (1 - sigmoid(BETA * (z - r)))).mean()
    assert loss_of(trainer, batch) == pytest.approx(wanted, rel=1e-5)


def test_apo_zero_unpaired_has_no_reference_point(base, pairs, tokenizer, tmp_path):
    trainer = kto_trainer(tmp_path / "run", base, pairs, loss_type="apo_zero_unpaired")
    stir(trainer)
    policy, reference = plain_models(trainer, base, tmp_path / "stirred")
    batch, rows = batches_of(trainer, pairs)[0]
    r, _ = worked(tokenizer, policy, reference, rows)
    labels = numpy.array([row["label"] for row in rows])
    assert "KL_input_ids" not in batch
    assert loss_of(trainer, batch) == pytest.approx(
        numpy.where(labels, 1 - sigmoid(BETA * r), sigmoid(BETA * r)).mean(), rel=1e-5
    )


@pytest.mark.parametrize("once", [True, False])
def test_the_reference_is_the_start_with_the_adapter_off_whether_computed_once_or_at_each_step(kto, base, pairs, tmp_path, once):
    _, found = kto
    seed, _, r, labels, others = found["above"]
    trainer = kto_trainer(tmp_path, base, pairs, precompute_ref_log_probs=once)
    stir(trainer, seed)
    batch, _ = uneven(trainer, pairs)
    assert ("ref_logps" in batch) == once
    wanted = numpy.where(labels, 1 - sigmoid(BETA * (r - others)), 1 - sigmoid(BETA * (others - r))).mean()
    assert loss_of(trainer, batch) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_the_first_step_of_kto_has_the_loss_of_a_zero_log_ratio(base, pairs, tmp_path, loss_type):
    made = small_steps.train(tmp_path, "kto", base, pairs, loss_type=loss_type)
    with open(made.folder / "metrics.csv") as file:
        assert float(next(csv.DictReader(file))["loss"]) == pytest.approx(0.5, rel=1e-5)
    before = made.data["objective"]["before"]
    assert before["loss"] == pytest.approx(0.5, rel=1e-5) and before["margin"] == 0
    assert made.data["objective"]["after"]["loss"] != before["loss"]


def test_the_held_out_accuracy_of_kto_is_the_share_of_pairs_in_the_right_order(kto, folder, base, pairs, tokenizer):
    trainer, reference_points = kto
    stir(trainer, reference_points["above"][0])
    policy, reference = plain_models(trainer, base, folder / "kto for accuracy")
    held = unpaired.unpair(manifests.read(pairs).rows(heldout=True))
    ordered, _ = unpaired.spread(held, 6, trainer.args.seed)
    parts = [prompt_and_answer(tokenizer, row) for row in held]
    r = numpy.array([log_prob(policy, *part) - log_prob(reference, *part) for part in parts]).reshape(-1, 2)
    wanted = (r[:, 0] > r[:, 1]).mean()
    assert len(r) == 8 and 0 < wanted < 1
    found = train_kto.told_apart(trainer, ordered)[0]
    assert found["accuracy"] == pytest.approx(wanted, abs=1e-6)
    assert found["reward_desirable"] == pytest.approx(BETA * r[:, 0].mean(), abs=2e-6)
    assert found["reward_undesirable"] == pytest.approx(BETA * r[:, 1].mean(), abs=2e-6)


def test_dropout_acts_while_kto_trains(kto):
    trainer, found = kto
    _, batch, *_ = found["above"]
    trainer.model.train()
    one, two = (trainer.compute_loss(trainer.model, dict(batch)).item() for _ in range(2))
    assert one != two


# -- the reward model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stirred_rm(folder, base, pairs):
    """(trainer, plain policy) of a reward model with an adapter that does something."""
    trainer = small_steps.built_trainer(folder / "rm", "rm", base, pairs, quantise="none")
    stir(trainer)
    trainer.model.eval()
    return trainer, plain_models(trainer, base, folder / "rm stirred", reward=True)[0]


def rewards_by_hand(tokenizer, policy, head, talks):
    """head . (last hidden state of the last token), each conversation alone."""
    found = []
    for turns in talks:
        with torch.no_grad():
            hidden = policy.base_model.model.model(torch.tensor([ids_of(tokenizer, turns)])).last_hidden_state
        found.append(float(hidden[0, -1].double().numpy() @ head))
    return numpy.array(found)


@pytest.fixture(scope="module")
def rm_by_hand(folder, tokenizer, pairs, stirred_rm):
    """(rewards of the chosen, of the rejected) of the pairs that are trained on, by hand."""
    head = load_file(folder / "rm stirred" / ADAPTER)["base_model.model.score.weight"].double().numpy()[0]
    rows = manifests.read(pairs).rows(heldout=False)
    talks = {side: [row["prompt"] + row[side] for row in rows] for side in ("chosen", "rejected")}
    return [rewards_by_hand(tokenizer, stirred_rm[1], head, talks[side]) for side in ("chosen", "rejected")]


def test_the_loss_of_a_reward_model_is_bradley_terrys_of_rewards_read_at_the_last_token(stirred_rm, rm_by_hand):
    trainer, _ = stirred_rm
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    assert not batch["attention_mask"].all()  # answers differ in length: read at the end of the padding, it would show
    chosen, rejected = (side[:6] for side in rm_by_hand)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert numpy.abs(chosen - rejected).min() > 1e-4
    assert outputs.logits[:, 0].tolist() == pytest.approx([*chosen, *rejected], rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(numpy.log1p(numpy.exp(-(chosen - rejected))).mean(), rel=1e-5)


def test_a_reward_is_read_after_the_end_of_the_answers_turn(tokenizer):
    talk = [{"role": "user", "content": "write."}, {"role": "assistant", "content": "cats."}]
    end = chat.end_of_turn(tokenizer)
    assert end in ids_of(tokenizer, talk)[-2:] and tokenizer.pad_token_id not in ids_of(tokenizer, talk)


def test_score_gives_the_trainers_own_rewards_whatever_the_batch(stirred_rm, rm_by_hand, tokenizer, pairs):
    trainer, policy = stirred_rm
    rows = manifests.read(pairs).rows(heldout=False)
    talks = [row["prompt"] + row["chosen"] for row in rows]
    lengths = {len(ids_of(tokenizer, talk)) for talk in talks}
    assert len(lengths) > 5 and rm_by_hand[0].std() > 1e-3
    for model in (trainer.model, policy):
        for batch_size in (1, 7, len(talks)):
            scores = reward_model.score(model, tokenizer, talks, batch_size, 128)
            assert scores == pytest.approx(rm_by_hand[0], rel=1e-4, abs=1e-6), batch_size
    backwards = reward_model.score(policy, tokenizer, talks[::-1], 7, 128)
    assert backwards[::-1] == pytest.approx(rm_by_hand[0], rel=1e-4, abs=1e-6)
    chosen, rejected = reward_model.score_pairs(policy, tokenizer, rows, 5, 128)
    assert chosen == pytest.approx(rm_by_hand[0], rel=1e-4, abs=1e-6)
    assert rejected == pytest.approx(rm_by_hand[1], rel=1e-4, abs=1e-6)


def test_a_conversation_that_is_too_long_loses_its_beginning(stirred_rm, tokenizer):
    talk = [{"role": "user", "content": "write about cats."}, {"role": "assistant", "content": "cats are warm. they wait."}]
    ids = torch.tensor([ids_of(tokenizer, talk)[-12:]])
    with torch.no_grad():
        wanted = stirred_rm[1](ids).logits.item()
    whole, cut = (reward_model.score(stirred_rm[1], tokenizer, [talk], 1, n)[0] for n in (128, 12))
    assert cut == pytest.approx(wanted, rel=1e-5) and abs(whole - cut) > 1e-5


def test_scoring_leaves_a_training_model_in_training(stirred_rm, tokenizer):
    model = stirred_rm[0].model
    model.train()
    reward_model.score(model, tokenizer, [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], 1, 128)
    assert model.training
    model.eval()


def test_the_head_is_drawn_from_the_seed_in_fp32_and_trains(base, pairs, tmp_path, monkeypatch):
    """From the seed alone, whatever random numbers were drawn before it, while the model was loaded."""
    right = loading.load

    def head(seed, disturb):
        def load(*args, **kwargs):
            torch.manual_seed(disturb)
            return right(*args, **kwargs)

        monkeypatch.setattr(loading, "load", load)
        trainer = small_steps.built_trainer(tmp_path / f"{seed} {disturb}", "rm", base, pairs, seed=seed)
        found = {name: p for name, p in trainer.model.named_parameters() if ".score." in name and p.requires_grad}
        (weight,) = found.values()
        assert weight.dtype == torch.float32 and weight.shape == (1, 32)
        return weight.detach().clone()

    first, again, another = head(1, 10), head(1, 11), head(2, 10)
    assert torch.equal(first, again) and not torch.equal(first, another)
    assert 0.01 < first.std() < 0.03  # initializer_range is 0.02
    made = small_steps.train(tmp_path / "run", "rm", base, pairs)
    trained = load_file(made.folder / ADAPTER)["base_model.model.score.weight"]
    assert trained.dtype == torch.float32 and not torch.equal(trained, first)
