"""Rollouts by the generator: drawn from the policy as it is now, with log-probabilities that the trainer finds again."""

import pandas
import pytest
import torch

from tests.support import small_steps
from tests.support.rollouts import answers_of, fixed_reward, log_probs, plain
from workflow_scripts.artifacts import manifests
from workflow_scripts.rl import rewards, rollouts

SIZES = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 24}


@pytest.fixture(scope="module")
def base(stammering_base):
    return stammering_base


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    return small_steps.instructions_slice(tmp_path_factory.mktemp("rows"), 40, "instructions")


def built(place, base, instructions, method="grpo", generation="graphs", **more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "functions", lambda job, parents: {"fixed": fixed_reward})
        patch.setitem(small_steps.CONFIG.experiments[method], "reward", "fixed")
        trainer = small_steps.built_trainer(place, method, base, instructions, **SIZES, **more)
    trainer.sample_by(generation, 384, 96)
    return trainer


def stir(trainer, seed, std=0.05):
    torch.manual_seed(seed)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data += std * torch.randn_like(parameter)


def sampled(trainer, seed=3):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(seed)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("quantise", ["none", "nf4"])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_samplers_log_probabilities_are_those_of_the_policy_as_it_is_now(base, instructions, tmp_path, method, quantise):
    trainer = built(tmp_path, base, instructions, method, quantise=quantise)
    for seed in (7, 8):  # another policy: the adapter is copied anew
        stir(trainer, seed)
        rollout = sampled(trainer)
        gaps = {name: trainer._metrics["train"][name][-1] for name in rollouts.GAPS}
        assert gaps["sampler/gap_max"] < 1e-3 and gaps["sampler/off_policy"] == 0, gaps
    trainer.model.save_pretrained(tmp_path / "stirred")
    if quantise == "none":
        for (prompt, answer), likely in zip(answers_of(rollout), trainer.sampled, strict=True):
            with torch.no_grad():
                wanted = log_probs(plain(base, tmp_path / "stirred"), prompt, answer)
            torch.testing.assert_close(torch.tensor(likely), wanted.float(), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo_ifeval"])
def test_a_training_by_the_generator_says_how_far_its_sampler_was_from_it(method, base, instructions, tmp_path):
    few = {"max_steps": 3, "max_completion_length": 12, "per_device_train_batch_size": 8}
    more = {} if method == "ppo_ifeval" else {"num_generations": 4}
    adapter = small_steps.train(tmp_path, method, base, instructions, **few, **more)
    curves = pandas.read_csv(adapter.folder / "metrics.csv")
    assert (curves["sampler/gap_max"].dropna() < 1e-3).all() and len(curves["sampler/gap"].dropna()) >= 1


def test_a_stale_adapter_in_the_sampler_is_seen_in_the_gap(base, instructions, tmp_path, monkeypatch):
    trainer = built(tmp_path, base, instructions)
    monkeypatch.setattr(type(trainer.engine), "load", lambda self: None)
    stir(trainer, 7, std=0.3)
    sampled(trainer)
    assert trainer._metrics["train"]["sampler/off_policy"][-1] > 0.2


def test_answers_to_one_prompt_differ_and_a_seed_draws_the_same_again(base, instructions, tmp_path):
    trainer = built(tmp_path, base, instructions)
    first, again, other = (answers_of(sampled(trainer, seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert len({tuple(answer) for _, answer in first}) > len({tuple(prompt) for prompt, _ in first})


def test_transformers_samples_where_the_config_says_so(base, instructions, tmp_path):
    trainer = built(tmp_path, base, instructions, generation="hf")
    assert trainer.engine is None
    assert len(answers_of(sampled(trainer))) == 8 and "sampler/gap" not in trainer._metrics["train"]


def test_an_answer_that_was_cut_off_pays_the_penalty(base):
    start = manifests.read(base)
    end = rewards.chat.end_of_turn(rewards.chat.tokenizer_of(start))
    assert rewards.unended(start)([], [], completion_ids=[[5, end], [5, 6], [end]]) == [0.0, -1.0, 0.0]
    config = {"reward": {"rm": 0.5}, "missing_eos_penalty": 0.7}
    assert rewards.weights(config, {"rm": fixed_reward, rewards.UNENDED: fixed_reward}) == [0.5, 0.7]
