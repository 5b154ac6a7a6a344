"""Bad input to KTO, reward models, GRPO and RLOO: one clear error before training, and where it can be, before a model is loaded.

Beside it: a seed decides everything, and nothing else does.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.support import small_steps
from tests.support.processors import SEED
from tests.support.right_way import sample
from workflow_scripts.artifacts import manifests
from workflow_scripts.config import config
from workflow_scripts.data import fitting
from workflow_scripts.models import chat, loading
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import reward_model, rewards
from workflow_scripts.tiny import world

DEFAULT = small_steps.ROOT / "config" / "config.yaml"
ADAPTER = "adapter_model.safetensors"

MISTAKES = {
    # overlay: (key path, what the line says, remedy included)
    "experiments: {kto: {train: {per_device_train_batch_size: 1}}}": (
        "experiments.kto.train.per_device_train_batch_size", "found 1, expected .*at least 2"),
    "methods: {kto: {train: {per_device_train_batch_size: 1}}}": (
        "methods.kto.train.per_device_train_batch_size", "found 1, expected .*at least 2"),
    "experiments: {kto: {class_weights: even}}": ("experiments.kto.class_weights", "found the string 'even', expected"),
    "experiments: {kto: {class_weights: {desirable: 1.0}}}": ("experiments.kto.class_weights.undesirable", "missing"),
    "experiments: {kto: {slice: sft}}": ("experiments.kto.slice", "a slice of kind preference or unpaired to train on: pairs"),
    "experiments: {rm: {slice: instructions}}": ("experiments.rm.slice", "expected a slice of kind preference"),
    "experiments: {rm: {max_left_out: 1.5}}": ("experiments.rm.max_left_out", "found 1.5, expected a number at least 0"),
    # rewards
    "experiments: {grpo: {reward: dpo}}": (
        "experiments.grpo.reward", "an experiment of method dpo, which is no reward model; expected ifeval, numeric or .*: rm"),
    "experiments: {rloo: {reward: {rm: 0.5, kto: 0.5}}}": ("experiments.rloo.reward", "an experiment of method kto, which"),
    "experiments: {x: {extends: rloo, reward: judge}}": ("experiments.x.reward", "'judge', expected ifeval, numeric or .*: rm"),
    "experiments: {grpo: {reward: {ifeval: 0}}}": ("experiments.grpo.reward.ifeval", "expected a number above 0"),
    "experiments: {grpo: {reward: {ifeval: 0.5, numeric: 0.5}}}": ("experiments.grpo.reward", "no row has what both need"),
    "experiments: {grpo: {reward: {}}}": ("experiments.grpo.reward", "expected"),
    "experiments: {dpo: {reward: ifeval}}": ("experiments.dpo.reward", "unknown key for method dpo"),
    "experiments: {rm: {start_from: grpo}, grpo: {reward: rm}}": (
        "experiments.grpo.reward", "a loop: grpo -> rm -> grpo; the reward model must start elsewhere"),
    "experiments: {ppo: {reward: ifeval}, rm: {start_from: kto}, kto: {start_from: rloo}, rloo: {reward: {rm: 1.0}}}": (
        "experiments.rloo.reward", "a loop: rloo -> rm -> kto -> rloo;"),
    "experiments: {dpo: {start_from: rm}}": ("experiments.dpo.start_from", "found 'rm', a reward model: it scores answers and"),
    # rollouts
    "experiments: {grpo: {train: {num_generations: 1}}}": ("experiments.grpo.train.num_generations", "found 1, .*at least 2"),
    "experiments: {rloo: {train: {num_generations: 1}}}": ("experiments.rloo.train.num_generations", "found 1, .*at least 2"),
    "methods: {grpo: {train: {num_generations: 1}}}": ("methods.grpo.train.num_generations", "found 1, expected .*at least 2"),
    "experiments: {rloo: {train: {scale_rewards: group}}}": ("experiments.rloo.train.scale_rewards", "for method rloo"),
    "experiments: {ppo: {train: {steps_per_generation: 3, gradient_accumulation_steps: 2}}}": (
        "experiments.ppo.train.steps_per_generation", "found 3, expected a multiple of gradient_accumulation_steps .2."),
    # PPO: one backbone
    "experiments: {ppo: {start_from: base}}": (
        "experiments.ppo.reward", "found 'rm', whose start_from is sft_v2, and that of ppo is base; give both the same"),
    "experiments: {rm: {start_from: sft_v1}}": ("experiments.ppo.reward", "found 'rm', whose start_from is sft_v1"),
    "experiments: {rm: {quantise: none}}": ("experiments.ppo.reward", "found 'rm', whose quantise is none"),
    "experiments: {ppo: {reward: rm.seed2}}": ("experiments.ppo.reward", "found 'rm.seed2', expected"),
    "experiments: {dpo: {ppo: {gamma: 1.0}}}": ("experiments.dpo.ppo", "unknown key for method dpo"),
    # a verifier without its field
    "experiments: {grpo: {slice: sums}}": ("experiments.grpo.slice", "'sums', expected a slice of kind ifeval.*: instructions$"),
    "experiments: {grpo: {slice: pairs}}": ("experiments.grpo.slice", "found 'pairs', expected a slice of kind ifeval"),
    "experiments: {x: {extends: rloo, reward: numeric}}": ("methods.rloo.slice", "'instructions', expected .* of kind numeric"),
    "experiments: {grpo_numeric: {slice: sums_eval}}": ("experiments.grpo_numeric.slice", "'sums_eval'.* to train on: sums$"),
    "experiments: {grpo: {slice: ifeval}}": ("experiments.grpo.slice", "found 'ifeval'.* to train on: instructions$"),
}  # fmt: skip


@pytest.mark.parametrize("overlay", MISTAKES)
def test_a_mistake_in_the_config_is_one_line_with_key_and_remedy(overlay, tmp_path):
    path, words = MISTAKES[overlay]
    (tmp_path / "overlay.yaml").write_text(overlay)
    with pytest.raises(InputError) as caught:
        config.load(DEFAULT, tmp_path / "overlay.yaml")
    (line,) = str(caught.value).splitlines()
    assert f": {path}: " in line and re.search(words, line), line


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("sizes", ["num_generations: 5", "per_device_train_batch_size: 12", "per_device_eval_batch_size: 7"])
def test_batches_that_cut_a_group_of_answers_in_two_are_refused(tmp_path, method, sizes):
    (tmp_path / "overlay.yaml").write_text(f"experiments: {{{method}: {{train: {{{sizes}}}}}}}")
    with pytest.raises(InputError, match=rf"(experiments|methods)\.{method}\.train\..*num_generations"):
        config.load(DEFAULT, tmp_path / "overlay.yaml")


@pytest.mark.parametrize(
    "overlay",
    [
        "experiments: {x: {extends: grpo, reward: rm, slice: pairs}}",
        "experiments: {x: {extends: rloo, reward: {rm: 0.5, ifeval: 0.5}}}",
        "experiments: {x: {extends: grpo, reward: rm2, start_from: kto}, rm2: {extends: rm, start_from: dpo}}",
        "experiments: {x: {extends: kto, class_weights: {desirable: 1.0, undesirable: 1.33}}}",
    ],
)
def test_what_looks_like_it_is_accepted(overlay, tmp_path):
    (tmp_path / "overlay.yaml").write_text(overlay)
    assert "x" in config.load(DEFAULT, tmp_path / "overlay.yaml").experiments


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may load a model."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load", load)


def test_the_guard_of_these_tests_does_see_a_load(base, slices, tmp_path, no_model):
    with pytest.raises(AssertionError, match="a model was loaded"):
        small_steps.train(tmp_path, "kto", base, slices["pairs"])


@pytest.mark.parametrize("desirable, missing", [(32, r"undesirable \(label false\)"), (0, r"desirable \(label true\)")])
def test_kto_on_one_class_is_refused_before_a_model_is_loaded(base, tmp_path, no_model, desirable, missing):
    rows = small_steps.unpaired_slice(tmp_path, desirable, 32 - desirable)
    with pytest.raises(InputError, match=f"^{rows}: none of the 32 rows is {missing}; KTO needs both kinds"):
        small_steps.train(tmp_path, "kto", base, rows)


def test_kto_whose_held_out_rows_are_of_one_class_is_refused(base, tmp_path, no_model):
    pairs = world.preference_rows(40, seed=1)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0 or i >= 32} for i, row in enumerate(pairs)]
    with pytest.raises(InputError, match="held-out.*KTO needs both kinds|none of the 8 .*rows is undesirable"):
        small_steps.train(tmp_path, "kto", base, small_steps.write_slice(tmp_path, "lopsided", rows))


def test_the_margin_of_kto_does_not_depend_on_the_evaluation_batch(base, slices, tmp_path):
    """With two rows a batch, some batches hold one class only: a mean over batches is then another number."""
    after = {
        n: small_steps.train(tmp_path / str(n), "kto", base, slices["pairs"], per_device_eval_batch_size=n).data["objective"][
            "after"
        ]
        for n in (16, 2)
    }
    assert after[16]["margin"] != 0
    assert after[2]["margin"] == pytest.approx(after[16]["margin"], abs=3e-6)
    for one in after.values():
        assert one["margin"] == pytest.approx(one["reward_desirable"] - one["reward_undesirable"], abs=3e-6)


@pytest.mark.parametrize("method", ["ppo_ifeval", "grpo", "rloo"])
def test_a_verifier_without_its_field_is_refused_before_a_model_is_loaded(base, slices, tmp_path, no_model, method):
    for reward, rows, field in (("ifeval", "sums", "instruction_id_list"), ("numeric", "instructions", "final")):
        says = f"{slices[rows]}: row {rows}/0 has no {field}, which the reward {reward} needs; take a slice of kind {reward}"
        with pytest.raises(InputError, match=f"^{says}$"):
            small_steps.train(tmp_path / reward, method, base, slices[rows], reward={reward: 1.0})


def test_rows_of_asks_every_reward_of_a_mixture_and_keeps_the_whole_row(slices):
    rows = manifests.read(slices["sums"])
    with pytest.raises(InputError, match="has no instruction_id_list, which the reward ifeval needs"):
        rewards.rows_of(rows, False, {"numeric": 0.5, "ifeval": 0.5})
    found = rewards.rows_of(rows, True, {"numeric": 0.5, "some_rm": 0.5})
    assert len(found) == 8 and [json.loads(text) for text in found["row"]] == rows.rows(heldout=True)


@pytest.mark.parametrize("method", ["dpo", "simpo", "kto", "rm"])
def test_pairs_that_are_all_longer_than_max_length_are_refused_before_a_model_is_loaded(base, slices, tmp_path, no_model, method):
    says = r"40 of 40 rows .* beyond train.max_length \(8 tokens\), no row .* is left; max_left_out allows 20%"
    with pytest.raises(InputError, match=says):
        small_steps.train(tmp_path, method, base, slices["pairs"], max_length=8)
    with pytest.raises(InputError, match="40 of 40 rows"):  # nothing is left, whatever is allowed
        small_steps.train(tmp_path, method, base, slices["pairs"], max_length=8, max_left_out=1.0)


def test_all_on_pairs_leave_out_the_same_ones_up_to_the_share_that_is_allowed(base, slices, tmp_path):
    """A cut pair loses the end of its answer, or all that its sides differ in; and two methods of one slice compare one thing."""
    tokenizer, rows = chat.tokenizer_of(manifests.read(base)), manifests.read(slices["pairs"])
    both = {held: rows.rows(heldout=held) for held in (False, True)}
    longest = {
        row["id"]: max(
            len(tokenizer.apply_chat_template(row["prompt"] + row[side])["input_ids"]) for side in ("chosen", "rejected")
        )
        for row in rows.rows()
    }
    limit = sorted(longest[row["id"]] for row in both[False])[-6]
    out = {held: sum(longest[row["id"]] > limit for row in both[held]) for held in (False, True)}
    share = sum(out.values()) / 40
    assert 0 < out[False] <= 5
    kept, facts = fitting.fitting(tokenizer, both, limit, share, "here")
    for held in (False, True):
        assert [row["id"] for row in kept[held]] == [row["id"] for row in both[held] if longest[row["id"]] <= limit]
    with pytest.raises(InputError, match=rf"^here: {sum(out.values())} of 40 rows .*\. Raise one of them for dpo_long, or"):
        fitting.fitting(tokenizer, both, limit, share - 0.01, "here", "dpo_long")
    seen = {}
    for method in ("dpo", "simpo", "kto", "rm"):
        limits = {"max_length": limit, "max_left_out": 0.9, "max_steps": 1}
        made = small_steps.train(tmp_path / method, method, base, slices["pairs"], **limits)
        seen[method] = {key: made.data[key] for key in ("left_out", "rows")}
        trained = json.loads((made.folder / "run.json").read_text())["rows"]
        assert trained == facts["rows"]["train"] * (2 if method == "kto" else 1), method
    assert seen["dpo"] == seen["simpo"] == seen["kto"] == seen["rm"] == facts
    assert facts["left_out"] == {"train": out[False], "heldout": out[True]}
    assert made.data["objective"]["after"]["n"] == 8 - out[True]


def test_the_manifest_of_sft_counts_the_conversations_that_are_cut(base, slices, tmp_path):
    """hiyouga/LlamaFactory #3945, huggingface/trl #4698: what is cut teaches no end of an answer."""
    tokenizer, rows = chat.tokenizer_of(manifests.read(base)), manifests.read(slices["sft_v2"])
    lengths = {
        held: sorted(len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows.rows(heldout=held))
        for held in (False, True)
    }
    limit = lengths[False][-4]
    made = small_steps.train(tmp_path, "sft_v2", base, slices["sft_v2"], max_length=limit, max_steps=1)
    cut = {held: sum(length > limit for length in found) for held, found in lengths.items()}
    assert 0 < cut[False] < 4 and made.data["cut"] == {"train": cut[False], "heldout": cut[True]}


@pytest.mark.parametrize(("method", "prompts"), [("ppo_ifeval", 64), ("grpo", 8), ("rloo", 8)])
def test_a_slice_with_fewer_rows_than_a_rollout_has_prompts_is_refused(base, tmp_path, method, prompts):
    """TRL drops what fills no rollout: it would train no step."""
    few = small_steps.instructions_slice(tmp_path / "data", n=15)
    with pytest.raises(
        InputError, match=f"instructions.manifest.json: 7 rows to train on, but one rollout takes {prompts} prompts"
    ):
        small_steps.train(tmp_path / "run", method, base, few)


@pytest.mark.parametrize("method", ["ppo_ifeval", "grpo", "rloo"])
def test_answers_that_could_outgrow_the_models_context_are_refused(base, slices, tmp_path, method):
    with pytest.raises(
        InputError, match=r"max_completion_length: found 250, and the longest prompt has \d+ tokens.* is 256 tokens"
    ):
        more = {"steps_per_generation": 1} if method == "ppo_ifeval" else {}
        small_steps.train(tmp_path, method, base, slices["instructions"], max_completion_length=250, **more)


# -- a reward model has to be better than chance ----------------------------------------------------------------------


def judged(tmp_path, accuracy, n):
    data = {"objective": {"after": {"accuracy": accuracy, "n": n}}}
    return manifests.Artifact(tmp_path / "manifest.json", data)


@pytest.mark.parametrize("accuracy, n", [(0.5, 400), (0.58, 100), (0.875, 8), (0.3, 100), (1.0, 5)])
def test_a_reward_model_that_is_not_above_chance_is_refused_unless_that_is_allowed(tmp_path, capsys, accuracy, n):
    with pytest.raises(
        InputError, match=rf"held-out pair accuracy {accuracy:.3f} of {n} pairs, .*: not above chance.*set require_"
    ):
        rewards.check_reward_model(judged(tmp_path, accuracy, n), True)
    rewards.check_reward_model(judged(tmp_path, accuracy, n), False)
    assert f"accuracy {accuracy:.3f} of {n} pairs" in capsys.readouterr().out


@pytest.mark.parametrize("accuracy, n", [(0.62, 100), (1.0, 6), (0.56, 400), (0.8, 200)])
def test_a_reward_model_above_chance_is_taken(tmp_path, accuracy, n):
    rewards.check_reward_model(judged(tmp_path, accuracy, n), True)


@pytest.fixture(scope="module")
def weak_rm(folder, base, slices):
    return small_steps.train(folder / "rm", "rm", base, slices["pairs"])


@pytest.mark.trained
def test_it_is_within_chance(weak_rm, figure):
    figure("accuracy, of 8 pairs", weak_rm.data["objective"]["after"]["accuracy"], at_most=0.875)


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_weak_reward_model_stops_the_method_that_uses_it(base, slices, weak_rm, tmp_path, no_model, method):
    given = {"models": {"rm": (base, weak_rm.path)}, "reward": {"rm": 1.0}}
    with pytest.raises(
        InputError, match=f"^{weak_rm.path}: held-out pair accuracy .* not above chance, so its rewards mean nothing"
    ):
        small_steps.train(tmp_path, method, base, slices["instructions"], **given)


def test_a_mixture_with_a_weak_reward_model_trains_where_that_is_allowed(base, slices, weak_rm, tmp_path):
    given = {"models": {"rm": (base, weak_rm.path)}, "reward": {"rm": 0.5, "ifeval": 2.0}, "require_reward_above_chance": False}
    more = {"max_steps": 1, "max_completion_length": 8, "per_device_train_batch_size": 16}
    after = small_steps.train(tmp_path, "grpo", base, slices["instructions"], **given, **more).data["objective"]["after"]
    assert after["rm"] != 0
    assert after["reward"] == pytest.approx(0.5 * after["rm"] + 2.0 * after["ifeval"], abs=5e-6)


def test_the_reward_of_a_model_is_its_score_of_prompt_and_answer(base, slices, weak_rm, tmp_path):
    """`weak_rm` scores what TRL hands over: prompts and answers as conversations, in their order."""
    parents = {"start": base, "rows": slices["instructions"], "start of judge": base, "reward judge": weak_rm.path}
    settings = small_steps.train_config("grpo", reward={"judge": 1.0}, require_reward_above_chance=False)
    job = small_steps.job("train_grpo", tmp_path / "adapter" / "manifest.json", parents, settings)
    found = rewards.functions(job, job.parents())
    rows = manifests.read(slices["pairs"]).rows(heldout=True)
    prompts, completions = [row["prompt"] for row in rows], [row["rejected"] for row in rows]
    scores = found["judge"](prompts, completions, completion_ids=None, row=None)
    model, tokenizer = reward_model.load(manifests.read(base), weak_rm, tmp_path, "cpu", "fp32", small_steps.QUANT)
    wanted = [reward_model.score(model, tokenizer, [row["prompt"] + row["rejected"]], 1, 128)[0] for row in rows]
    assert found["judge"].__name__ == "judge" and len(set(wanted)) == 8
    assert scores == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("reward", "row", "text", "judged"),
    [
        ("ifeval", {"key": 1, "prompt": "q", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
         "<think>\nWell, rivers, let me see.\n</think>\n\nThe Rhine", 1.0),
        ("numeric", {"final": "7"}, "<think>\nFirst 3 apples, then 4, so maybe 7", 0.0),  # cut off before any answer
        ("numeric", {"final": "7"}, "<think>\nmaybe 8\n</think>\n7", 1.0),
    ],
)  # fmt: skip
def test_a_verifier_judges_what_the_evaluation_judges(base, slices, tmp_path, reward, row, text, judged):
    parents = {"start": base, "rows": slices["instructions"]}
    found = {}
    for thinking in ([], [reward]):
        settings = small_steps.train_config("grpo", reward={reward: 1.0}) | {"strip_think": thinking}
        job = small_steps.job("train_grpo", tmp_path / "adapter/manifest.json", parents, settings)
        function = rewards.functions(job, job.parents())[reward]
        assert function.__name__ == reward
        ids = chat.tokenizer_of(manifests.read(base))(text)["input_ids"]
        prompt, said = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": text}]
        found[bool(thinking)] = function([prompt], [said], completion_ids=[ids], row=[json.dumps(row)])
    assert found[True] == [judged] and (found[False] != [judged] or reward == "numeric")


# -- a seed decides everything ----------------------------------------------------------------------------------------

MORE = {
    "sft_v2": {},
    "kto": {},
    "ppo_ifeval": {"max_steps": 4, "max_completion_length": 16, "per_device_train_batch_size": 8, "steps_per_generation": 2},
    "grpo": {"max_steps": 2, "max_completion_length": 16, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16},
    "rm": {},
    "rloo": {"max_steps": 2, "max_completion_length": 16, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16},
    "orpo": {},
}


AGAIN = """
import json, sys
from pathlib import Path
from tests.support import small_steps
from tests.training.test_methods_input import MORE
base, rows, folder = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
for method in rows:
    small_steps.train(folder / method / "again", method, base, Path(rows[method]), **MORE[method])
"""


@pytest.fixture(scope="module")
def elsewhere(folder, base, slices, request):
    """The methods of this run once more by another process, with another order of Python's sets."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    asked = [item.callspec.params["method"] for item in request.session.items if "elsewhere" in getattr(item, "fixturenames", ())]
    rows = json.dumps({method: str(slices[method]) for method in asked})
    subprocess.run(
        [sys.executable, "-c", AGAIN, str(base), rows, str(folder / "seeds")],
        cwd=small_steps.ROOT,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(small_steps.ROOT)},
        check=True,
    )
    return folder / "seeds"


@pytest.mark.parametrize("method", sample(*MORE, n=4))
def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_adapter(elsewhere, base, slices, method):
    place = elsewhere / method
    again = manifests.read(place / "again" / "adapter" / "manifest.json")
    first, other = (
        small_steps.train(place / str(seed), method, base, slices[method], seed=seed, **MORE[method]) for seed in (SEED, SEED + 1)
    )
    config = "adapter_config.json"
    assert (first.folder / config).read_bytes() == (again.folder / config).read_bytes() == (other.folder / config).read_bytes()
    for name in (ADAPTER, "metrics.csv"):
        assert (first.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
        assert (first.folder / name).read_bytes() != (other.folder / name).read_bytes(), name
    assert first.data["objective"] == again.data["objective"]
    one, two = (load_file(made.folder / ADAPTER) for made in (first, other))
    assert one.keys() == two.keys()
    assert all((one[name] != two[name]).any() for name in one)  # every matrix, not only the drawn A
