"""PPO as the step trains it: against values worked by hand, and policy, value, reward and base kept apart.

By hand: each answer alone, without padding, through a plainly loaded model with one adapter, and the rest by numpy.
"""

from types import SimpleNamespace

import numpy
import pytest
import torch

from tests.support import small_steps
from tests.support.ppo_trainers import PPO, SIZES, batch_of, built, sampled, step, stir, with_rm
from tests.support.rollouts import answers_of, fixed_reward, log_probs, plain
from workflow_scripts.artifacts import manifests
from workflow_scripts.rl import reward_model

pytestmark = pytest.mark.trained  # what is compared is worked by hand, but that there is something to compare, the base decides
PARTS = ("default", "value", "reward_rm")


@pytest.fixture(scope="module")
def base(stammering_base):
    return stammering_base


@pytest.fixture(scope="module")
def rm(folder, base, slices):
    """Reward model by its quantisation; with large steps, so that its rewards are not all alike."""
    settings = {"learning_rate": 0.02, "num_train_epochs": 3}
    return {
        how: small_steps.train(folder / f"rm {how}", "rm", base, slices["rm"], quantise=how, **settings)
        for how in ("none", "nf4")
    }


def snapshot(trainer):
    """Part -> its weights. The base is what belongs to no adapter."""
    parts = {name: {} for name in (*PARTS, "base")}
    for key, p in trainer.model.named_parameters():
        found = [name for name in PARTS if f".{name}." in key] or (["value"] if "v_head" in key else ["base"])
        parts[found[0]][key] = p.detach().clone()
    for name, model in trainer.reward_models.items():
        parts[f"reward_{name}"]["score"] = model.score.weight.detach().clone()
    return parts


def gradients(trainer):
    """Part -> sum of the absolute gradients, None where there is none at all."""
    parts = dict.fromkeys((*PARTS, "base"))
    for key, p in trainer.model.named_parameters():
        if p.grad is not None:
            part = next((name for name in PARTS if f".{name}." in key), "value" if "v_head" in key else "base")
            parts[part] = (parts[part] or 0.0) + p.grad.abs().sum().item()
    return parts


# -- first sight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_at_first_sight_the_kl_is_0_and_the_ratio_1(base, instructions, tmp_path, quantise):
    trainer = built(tmp_path, base, instructions, quantise=quantise)
    batch = sampled(trainer)
    noted = trainer._metrics["train"]
    assert noted["kl"] == [0.0] and noted["kl_coef"] == [PPO["kl_coef"]]
    stir(trainer, "default")
    batch = sampled(trainer)
    assert noted["kl"][-1] != 0
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    for rows in torch.randperm(12).split(4):  # in other batches than those in which they were measured
        now, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids[rows], mask[rows], batch["completion_ids"].shape[1]
        )
        real = batch["completion_mask"][rows].bool()
        assert now.requires_grad
        assert torch.equal(torch.exp(now - batch["old_per_token_logps"][rows])[real], torch.ones(int(real.sum())))


def test_one_answer_is_sampled_for_each_prompt_and_the_policy_alone_counts_as_the_adapter(base, instructions, rm, tmp_path):
    trainer = with_rm(tmp_path, base, instructions, rm)
    trainable = {key for key, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable and all(".default." in key for key in trainable)
    assert {p.dtype for key, p in trainer.model.named_parameters() if "lora_" in key or "v_head" in key} == {torch.float32}
    assert not any(p.requires_grad for p in trainer.reward_models["rm"].parameters())
    assert trainer.num_generations == 1 and len(sampled(trainer)["completion_ids"]) == 12


# -- by hand ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(folder, base, instructions):
    """A rollout of a policy and of a value function that do something, with all that is needed to work it out by hand."""
    place = folder / "case"
    trainer = built(place, base, instructions, kl_coef=0.3, gamma=0.97, lam=0.9, missing_eos_penalty=0.7)
    stir(trainer, "default")
    stir(trainer, "value", seed=8)
    for seed in range(3, 20):  # of twelve answers some end and some are cut off, at nearly every seed
        rollout = sampled(trainer, seed)
        if 0 < trainer._metrics["train"]["missing_eos"][-1] < 1:
            break
    trainer.model.save_pretrained(place / "adapters")
    answers, policy = answers_of(rollout), plain(base, place / "adapters")
    with torch.no_grad():
        logps = [log_probs(policy, *one).numpy() for one in answers]
        reference = [log_probs(plain(base), *one).numpy() for one in answers]
    value = plain(base, place / "adapters" / "value")
    assert len({len(answer) for _, answer in answers}) > 3
    return SimpleNamespace(
        trainer=trainer, rollout=rollout, answers=answers, policy=policy, value=value, logps=logps, ref=reference, place=place,
        head=SimpleNamespace(**{key: p.detach().clone().requires_grad_() for key, p in trainer.v_head.named_parameters()}),
    )  # fmt: skip


def values_by_hand(case):
    """V before each token of each answer, (T,), with its gradient."""
    decoder = case.value.get_base_model().model
    for prompt, answer in case.answers:
        hidden = decoder(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1]
        yield hidden @ case.head.weight[0] + case.head.bias[0]


def targets_by_hand(case):
    """(raw advantages, returns) of each answer, by the sums of their definition."""
    end = case.trainer.eos_token_ids
    scores = fixed_reward(
        [[{"content": str(prompt)}] for prompt, _ in case.answers], None, [answer for _, answer in case.answers]
    )
    found = []
    with torch.no_grad():
        values = [v.double().numpy() for v in values_by_hand(case)]
    for (_, answer), score, logps, ref, value in zip(case.answers, scores, case.logps, case.ref, values, strict=True):
        rewards = -0.3 * (logps - ref)
        rewards[-1] += score - (0.7 if answer[-1] not in end else 0.0)
        delta = rewards + 0.97 * numpy.append(value[1:], 0.0) - value
        raw = numpy.array([sum((0.97 * 0.9) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))])
        found.append((raw, raw + value, value))
    return found


def test_advantages_and_returns_equal_those_worked_by_hand(case):
    targets = targets_by_hand(case)
    raw = numpy.concatenate([one[0] for one in targets])
    mask = case.rollout["completion_mask"].bool()
    assert 0 < case.trainer._metrics["train"]["missing_eos"][-1] < 1
    assert case.rollout["old_values"][mask].tolist() == pytest.approx(numpy.concatenate([one[2] for one in targets]), abs=2e-5)
    assert case.rollout["returns"][mask].tolist() == pytest.approx(numpy.concatenate([one[1] for one in targets]), abs=1e-4)
    whitened = (raw - raw.mean()) / raw.std(ddof=1)
    assert case.rollout["advantages"][mask].tolist() == pytest.approx(whitened.tolist(), abs=1e-4)
    assert (case.rollout["advantages"][~mask] == 0).all()
    kl = numpy.mean([(a - b).sum() for a, b in zip(case.logps, case.ref, strict=True)])
    assert case.trainer._metrics["train"]["kl"][-1] == pytest.approx(kl, rel=1e-4)


def test_the_policy_loss_equals_the_one_worked_by_hand_at_first_sight_and_once_it_has_moved(case, base):
    trainer, mask = case.trainer, case.rollout["completion_mask"].bool()
    advantage = [case.rollout["advantages"][i][mask[i]].numpy() for i in range(12)]

    def by_hand(logps):
        ratios = numpy.concatenate([numpy.exp(a - b) for a, b in zip(logps, case.logps, strict=True)])
        both = numpy.concatenate(advantage)
        return -numpy.minimum(ratios * both, numpy.clip(ratios, 0.8, 1.2) * both).mean(), ratios

    loss = trainer._compute_loss(trainer.model, case.rollout)
    assert loss.item() == pytest.approx(by_hand(case.logps)[0], abs=1e-5)
    kept = snapshot(trainer)
    try:
        stir(trainer, "default", seed=9)
        trainer.model.save_pretrained(case.place / "moved")
        moved = plain(base, case.place / "moved")
        with torch.no_grad():
            loss = trainer._compute_loss(trainer.model, case.rollout).item()
            wanted, ratios = by_hand([log_probs(moved, *one).numpy() for one in case.answers])
    finally:
        restore(trainer, kept)
    assert ratios.min() < 0.8 and ratios.max() > 1.2
    assert loss == pytest.approx(wanted, rel=1e-4)


def restore(trainer, kept):
    weights = {key: value for part in kept.values() for key, value in part.items()}
    for key, p in trainer.model.named_parameters():
        p.data = weights[key].clone()


def test_a_step_gives_each_part_the_gradient_that_it_has_alone(case, base):
    """By hand: -A log pi for the policy, at a ratio of 1, and half the squared error for the values."""
    trainer = case.trainer
    trainer.model.zero_grad()
    trainer._step = 0
    trainer._buffered_inputs = None
    prompts = batch_of(trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_generate_and_score_completions", lambda _: dict(case.rollout))
        patch.setattr(trainer.args, "steps_per_generation", 1)
        step(trainer, prompts)
    mask = case.rollout["completion_mask"].bool()
    n = int(mask.sum())
    policy, value = 0.0, 0.0
    for i, (one, values) in enumerate(zip(case.answers, values_by_hand(case), strict=True)):
        policy = policy - (case.rollout["advantages"][i][mask[i]] * log_probs(case.policy, *one)).sum() / n
        value = value + 0.5 * ((values - case.rollout["returns"][i][mask[i]]) ** 2).sum() / n
    for model in (case.policy, case.value):
        model.zero_grad()
    mine = {key: p.grad for key, p in trainer.model.named_parameters() if p.grad is not None}
    head = torch.autograd.grad(value, case.head.weight, retain_graph=True)[0]
    assert torch.allclose(mine.pop("base_model.model.v_head.weight"), head, rtol=1e-3, atol=1e-5)
    policy.backward()
    value.backward()
    for model, part in ((case.policy, "default"), (case.value, "value")):
        for key, p in model.named_parameters():
            if "lora_" in key:
                found = mine[key.replace(".default.", f".{part}.")]
                assert torch.allclose(found, p.grad.float(), rtol=2e-3, atol=2e-3 * p.grad.abs().max().item() + 1e-7), (part, key)


# -- kept apart -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_policy_and_value_get_gradients_reward_and_base_none(base, instructions, rm, tmp_path, quantise):
    """And the same ones with activation checkpointing, which recomputes with the adapter that is active at that time."""
    sums = []
    for on in (False, True):
        trainer = with_rm(tmp_path / str(on), base, instructions, rm, quantise)
        if on:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
            trainer.model.enable_input_require_grads()
        for part in ("default", "value"):
            stir(trainer, part)
        step(trainer, batch_of(trainer))
        found = gradients(trainer)
        assert found["default"] > 1e-3 and found["value"] > 1e-3
        assert not found["reward_rm"] and not found["base"]
        sums.append((found["default"], found["value"]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)


def test_an_update_moves_policy_and_value_and_nothing_else(base, instructions, rm, tmp_path):
    trainer = with_rm(tmp_path, base, instructions, rm)
    stir(trainer, "default")
    before = snapshot(trainer)
    step(trainer, batch_of(trainer))
    trainer._clip_grad_norm(trainer.model)
    trainer.optimizer.step()
    after = snapshot(trainer)
    moved = {part: any(not torch.equal(w, after[part][key]) for key, w in before[part].items()) for part in before}
    assert moved == {"default": True, "value": True, "reward_rm": False, "base": False}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before["default"]) + len(before["value"])
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [5e-4, PPO["value_learning_rate"]]


def test_gradients_are_clipped_each_by_their_own_norm(base, instructions, tmp_path):
    """A value loss a thousand times larger takes nothing from the policy."""
    trainer = built(tmp_path, base, instructions)
    stir(trainer, "default")
    step(trainer, batch_of(trainer))
    policy, value = trainer._adapter("default"), trainer._adapter("value")
    half = 0.5 * trainer.args.max_grad_norm / torch.stack([p.grad.norm() for p in policy]).norm()
    for p in policy:
        p.grad *= half  # below the limit: to be left alone
    for p in value:
        p.grad *= 1000
    before = [p.grad.clone() for p in policy]
    norm = trainer._clip_grad_norm(trainer.model)
    assert norm < trainer.args.max_grad_norm and all(torch.equal(p.grad, g) for p, g in zip(policy, before, strict=True))
    assert torch.stack([p.grad.norm() for p in value]).norm().item() == pytest.approx(trainer.args.max_grad_norm, rel=1e-4)


def test_accumulated_micro_batches_weigh_what_they_are(base, instructions, tmp_path):
    """Two micro-batches of the same answers give the gradient of one, for the policy and for the values."""
    trainer = built(tmp_path, base, instructions)
    stir(trainer, "default")
    sums = []
    for micro_batches in (1, 2):
        trainer.model.zero_grad()
        trainer._step, trainer._buffered_inputs, trainer.current_gradient_accumulation_steps = 0, None, micro_batches
        prompts = batch_of(trainer)
        step(trainer, prompts)
        if micro_batches == 2:
            trainer._buffered_inputs[1] = trainer._buffered_inputs[0]
            step(trainer, prompts)
        sums.append([gradients(trainer)[part] for part in ("default", "value")])
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)


def test_in_the_warm_up_only_the_value_function_trains(base, instructions, tmp_path):
    trainer = built(tmp_path, base, instructions, value_warmup=1)
    stir(trainer, "default")
    before = snapshot(trainer)
    step(trainer, batch_of(trainer))
    trainer.optimizer.step()
    after = snapshot(trainer)
    assert all(torch.equal(w, after["default"][key]) for key, w in before["default"].items())
    assert any(not torch.equal(w, after["value"][key]) for key, w in before["value"].items())
    trainer.state.global_step = 6  # one rollout: 3 mini-batches, 2 epochs
    assert trainer.rollouts_before == 1
    assert sampled(trainer)["advantages"].abs().max() > 0


def test_each_epoch_takes_the_answers_in_a_new_order(base, instructions, tmp_path):
    trainer = built(tmp_path, base, instructions)
    prompts = batch_of(trainer)
    seen = []
    for _ in range(6):
        step(trainer, prompts)
        batch = trainer._buffered_inputs[(trainer._step - 1) % 3]
        seen.append([tuple(ids) for ids in torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1).tolist()])
        # what belongs to an answer goes with it
        assert (batch["old_values"].shape, batch["returns"].shape) == (batch["completion_ids"].shape,) * 2
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) and first != second


# -- reward model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_a_reward_model_on_the_policys_backbone_scores_as_the_one_that_was_trained(base, slices, rm, tmp_path, quantise):
    trainer = with_rm(tmp_path, base, slices["ppo"], rm, quantise)
    stir(trainer, "default", std=0.5)
    quant = small_steps.QUANT if quantise == "nf4" else None
    alone, tokenizer = reward_model.load(manifests.read(base), rm[quantise], tmp_path, "cpu", "fp32", quant)
    talks = [row["prompt"] + row["chosen"] for row in manifests.read(slices["rm"]).rows()]
    wanted = reward_model.score(alone, tokenizer, talks, 8, 128)
    found = reward_model.score(trainer.reward_models["rm"], tokenizer, talks, 8, 128)
    assert numpy.std(wanted) > 0.01  # a thousand times what may be between them
    assert found == pytest.approx(wanted, abs=1e-5)
    assert trainer.model.active_adapter == "default"


@pytest.fixture(scope="module")
def trained(folder, base, instructions, rm):
    """PPO against the reward model, to the end."""
    more = SIZES | {"max_steps": 12, "require_reward_above_chance": False}
    return small_steps.train(folder / "trained", "ppo", base, instructions, models={"rm": (base, rm["nf4"].path)}, **more)


def test_the_artifact_is_the_policy_alone_and_plain_peft_loads_it(trained, base):
    from peft import PeftModel
    from safetensors.torch import load_file

    names = {path.name for path in trained.folder.iterdir()} - {".work"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "metrics.csv", "run.json"}
    tensors = load_file(trained.folder / "adapter_model.safetensors")
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in tensors)
    model = PeftModel.from_pretrained(plain(base), trained.folder)
    loaded = {key: p for key, p in model.named_parameters() if "lora_" in key}
    assert len(loaded) == len(tensors)
    assert all(torch.equal(p, tensors[key.replace(".default", "")]) for key, p in loaded.items())
    assert trained.data["adapter_moved"] == 1.0 and set(trained.data["objective"]["after"]) == {"reward", "rm", "tokens"}


def test_the_curves_have_ppos_figures_and_nothing_of_groups(trained):
    import pandas

    curves = pandas.read_csv(trained.folder / "metrics.csv")
    wanted = {
        "reward", "score", "kl", "kl_coef", "entropy", "value_loss", "explained_variance", "clip_fraction", "value_clip_fraction",
        "missing_eos", "completions/mean_length", "rewards/rm/mean", "grad_norm", "value_grad_norm", "learning_rate",
    }  # fmt: skip
    assert wanted <= set(curves.columns)
    assert not [name for name in curves.columns if "zero_std" in name or "clip_ratio" in name or "advantage" in name]
    steps = curves[curves["value_loss"].notna()]
    assert (
        len(steps) == 12 and steps["kl"].notna().sum() == 2 and steps["kl"].iloc[0] == 0
    )  # two rollouts, the first by the start


def test_a_kl_target_steers_the_coefficient(base, instructions, tmp_path):
    trainer = built(tmp_path, base, instructions, kl_target=1.0)
    sampled(trainer)  # KL 0: below the target
    assert trainer.kl_coef == pytest.approx(0.98 * PPO["kl_coef"])
    fixed = built(tmp_path / "fixed", base, instructions)
    sampled(fixed)
    assert fixed.kl_coef == PPO["kl_coef"]
