"""The constant block on the built trainers, and what is caught when one of them differs."""

import pytest
import torch

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import loading, lora
from workflow_scripts.plumbing.messages import InputError

# -- the block on the model -------------------------------------------------------------------------------------------


def test_target_modules_that_the_model_lacks_are_an_error_that_lists_its_linear_layers(base, tmp_path):
    model = loading.load(manifests.read(base), tmp_path, "cpu", "fp32")
    block = small_steps.LORA | {"target_modules": ["q_proj", "query_key_value"]}
    layers = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(InputError, match=f"no layers named query_key_value; its linear layers are {layers}. Set"):
        lora.adapter_config(block, model)


def test_adapters_are_fp32_and_start_alike_for_nf4_and_full_precision_and_for_each_method(base, slices, tmp_path):
    def start(experiment, quantise, seed=1):
        rows = slices[experiment]
        trainer = small_steps.built_trainer(tmp_path, experiment, base, rows, seed, quantise=quantise)
        layers = {type(module).__name__ for module in trainer.model.modules() if "4bit" in type(module).__name__}
        assert bool(layers) == (quantise == "nf4")
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    one = start("sft_v2", "nf4")
    assert {p.dtype for p in one.values()} == {torch.float32}
    assert all((p == 0).all() == ("lora_B" in name) for name, p in one.items())
    for same in (start("sft_v2", "none"), start("dpo", "none"), start("dpo", "nf4")):
        assert {p.dtype for p in same.values()} == {torch.float32}
        assert same.keys() == one.keys() and all(torch.equal(same[name], one[name]) for name in one)
    another = start("sft_v2", "nf4", seed=2)
    assert all(not torch.equal(another[name], one[name]) for name in one if "lora_A" in name)


# -- the assertion on the built trainer -------------------------------------------------------------------------------


@pytest.fixture(params=["sft_v2", "dpo", "dpo_4bit"])
def trainer(request, base, slices, tmp_path):
    rows = slices[request.param]
    return small_steps.built_trainer(tmp_path, request.param, base, rows, gradient_checkpointing=False)


def check(trainer):
    return lora.check_trainer(trainer, small_steps.LORA, "adamw_torch")


def test_the_steps_build_trainers_that_pass(trainer):
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # q k v o gate up down, by hand
    assert check(trainer) == {
        "trainable_parameters": 2 * sum(16 * (a + b) for a, b in shapes),
        "adapter_dtype": "fp32",
        "lora_dropout": [0.05],
        "optimizer": "AdamW",
    }


def lora_dropouts(trainer):
    return [m for name, m in trainer.model.named_modules() if "lora_dropout" in name and isinstance(m, torch.nn.Dropout)]


def bf16(trainer):
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.data = parameter.data.bfloat16()


def no_dropout(trainer):
    from trl.trainer.utils import disable_dropout_in_model

    disable_dropout_in_model(trainer.model)


def half_dropout(trainer):
    lora_dropouts(trainer)[0].p = 0.0


def sgd(trainer):
    trainer.args.optim = "sgd"


def eight_bit(trainer):
    trainer.args.optim = "adamw_8bit"


def trainable_norm(trainer):
    next(p for name, p in trainer.model.named_parameters() if "norm" in name).requires_grad = True


def frozen(trainer):
    trainer.model.requires_grad_(False)


@pytest.mark.parametrize(
    "change, says",
    [
        (bf16, "not fp32.*lora_A"),
        (no_dropout, r"dropout \[0\], expected 0.05"),
        (half_dropout, r"dropout \[0.0, 0.05\], expected 0.05"),
        (sgd, "optimiser SGD"),
        (eight_bit, "state of 8 bits"),
        (trainable_norm, "outside the LoRA block.*norm"),
        (frozen, "nothing is trainable"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_trainer_that_differs_is_caught(base, slices, tmp_path, change, says):
    trainer = small_steps.built_trainer(tmp_path, "dpo_4bit", base, slices["dpo"])
    change(trainer)
    with pytest.raises(AssertionError, match=says):
        check(trainer)


def test_optimiser_moments_that_are_not_fp32_are_caught(base, slices, tmp_path, monkeypatch):
    from trl import DPOTrainer

    right = DPOTrainer.train

    def train(self, **options):
        done = right(self, **options)
        next(iter(self.optimizer.state.values()))["exp_avg"] = torch.zeros(4, dtype=torch.bfloat16)
        return done

    monkeypatch.setattr(DPOTrainer, "train", train)
    with pytest.raises(AssertionError, match="optimiser state in .*bfloat16"):
        small_steps.train(tmp_path / "run", "dpo", base, slices["dpo"])
    assert not (tmp_path / "run" / "adapter" / "manifest.json").exists()


def test_no_default_of_trl_sneaks_in(base, slices, tmp_path):
    """Each value of the config arrives, and whatever TRL sets otherwise than transformers is set by us."""
    import dataclasses

    import trl
    from transformers import TrainingArguments

    from workflow_scripts.training import trainers

    plain = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for experiment, cls in (("sft_v2", trl.SFTConfig), ("dpo", trl.DPOConfig)):
        config = small_steps.train_config(experiment)
        job = small_steps.job("x", tmp_path / "adapter" / "manifest.json", {}, config)
        ours = trainers.arguments(job) | config["train"] | ({"disable_dropout": False} if experiment == "dpo" else {})
        changed = {f.name for f in dataclasses.fields(cls) if f.name in plain and f.default != plain[f.name]}
        renamed = {"activation_checkpointing": "gradient_checkpointing"}
        assert {"learning_rate", "bf16"} <= changed
        assert {renamed.get(name, name) for name in changed} <= set(ours), f"{cls.__name__} changes {changed - set(ours)}"
        trainer = small_steps.built_trainer(tmp_path / experiment, experiment, base, slices[experiment])
        for key, value in ours.items():
            found = getattr(trainer.args, key)
            if key not in ("output_dir", "report_to", "loss_type", "run_name"):
                assert getattr(found, "value", found) == value, key
        assert trainer.args.loss_type in (ours["loss_type"], [ours["loss_type"]])
        assert {m.p for m in lora_dropouts(trainer)} == {0.05}


IN_PPO = {
    "loss_type", "beta", "use_bias_correction_kl", "importance_sampling_level", "mask_truncated_completions", "num_generations",
    "num_generations_eval",
}  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "name", "by_the_step"),
    [
        ("kto", "KTOConfig", {"disable_dropout", "train_sampling_strategy"}),
        ("rm", "RewardConfig", {"disable_dropout"}),
        # PPO's advantages are not GRPO's: what only those depend on decides nothing
        ("ppo_ifeval", "GRPOConfig", {"disable_dropout", *IN_PPO, "scale_rewards", "multi_objective_aggregation"}),
        ("grpo", "GRPOConfig", {"disable_dropout"}),
        ("rloo", "RLOOConfig", {"disable_dropout"}),
    ],
)
def test_what_trl_sets_otherwise_than_transformers_is_set_by_us_in_every_method(experiment, name, by_the_step, tmp_path):
    import dataclasses

    import trl
    from transformers import TrainingArguments

    from workflow_scripts.training import trainers

    plain = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    job = small_steps.job("x", tmp_path / "adapter" / "manifest.json", {}, small_steps.train_config(experiment))
    ours = set(trainers.arguments(job)) | set(job.config["train"]) | by_the_step
    fields = {field.name: field.default for field in dataclasses.fields(getattr(trl, name))}
    changed = {key for key, value in fields.items() if key in plain and value != plain[key]}
    needed_by_trl = {"remove_unused_columns"}  # the rewards get the rows' columns
    renamed = {"activation_checkpointing": "gradient_checkpointing"}
    assert {"learning_rate", "bf16"} <= changed
    assert {renamed.get(key, key) for key in changed - needed_by_trl} <= ours, sorted(changed - ours)
    of_the_method = {
        "loss_type", "beta", "temperature", "top_p", "top_k", "num_generations", "num_generations_eval", "max_completion_length",
        "num_iterations", "epsilon", "scale_rewards", "mask_truncated_completions", "use_bias_correction_kl", "max_length",
        "importance_sampling_level", "multi_objective_aggregation", "normalize_advantages", "disable_dropout",
    }  # fmt: skip
    assert of_the_method & set(fields) <= ours, sorted((of_the_method & set(fields)) - ours)
