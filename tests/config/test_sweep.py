"""A rank sweep: which copies it declares, what it refuses, that it leaves the others alone, and adapters of rank 8 for real."""

import json
import re

import pytest
import yaml

from tests.conftest import ROOT, make_clone
from tests.support import report_world, small_steps
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.experiments import rewards
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import differences

DEFAULT, MICRO, SWEEP = ROOT / "config/config.yaml", ROOT / "tests/support/config/micro.yaml", ROOT / "config/rank_sweep.yaml"
SMOLLM2, STUDY = ROOT / "config/smollm2.yaml", ROOT / "config/qwen05b.yaml"
CHAIN = ["sft_v2", "dpo", "kto", "rm", "ppo", "grpo", "rloo"]


@pytest.fixture
def over(tmp_path):
    """over(text): the default config with this overlay, which is called overlay.yaml in errors."""

    def of(text: str) -> Config:
        (tmp_path / "overlay.yaml").write_text(text)
        return load(DEFAULT, tmp_path / "overlay.yaml")

    return of


# -- the copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [DEFAULT, SMOLLM2, STUDY], ids=lambda path: path.stem)
def test_the_chain_is_copied_at_both_ranks_without_variants_and_controls(base):
    config = load(base, SWEEP)
    assert config.copies == {f"{name}_r{rank}": name for rank in (8, 32) for name in CHAIN}
    assert set(config.experiments) == set(load(base).experiments) | set(config.copies)


def test_a_copy_differs_by_its_rank_and_by_what_it_is_made_from():
    config = load(STUDY, SWEEP)
    block = config.data["lora"]
    for copy, name in config.copies.items():
        rank = int(copy.rpartition("_r")[2])
        body, own = dict(config.experiments[copy]), dict(config.experiments[name])
        assert body.pop("lora") == block | {"r": rank, "alpha": 2 * rank} and "lora" not in own
        start, starts = body.pop("start_from"), own.pop("start_from")
        assert start == (f"sft_v2_r{rank}" if starts == "sft_v2" else "base")
        reward, rewarded = body.pop("reward", None), own.pop("reward", None)
        assert reward == (f"rm_r{rank}" if rewarded == "rm" else rewarded)
        assert body == own and "sweep" not in body
    assert config.experiments["grpo_r8"]["reward"] == "numeric" and config.experiments["ppo_r32"]["reward"] == "rm_r32"


def test_a_mixture_keeps_its_weights_and_its_verifier(over):
    config = over("{experiments: {sft_v2: {sweep: rank}, grpo: {reward: {rm: 0.25, ifeval: 0.75}}}}")
    assert rewards(config.experiments["grpo_r8"]) == {"rm_r8": 0.25, "ifeval": 0.75}
    assert rewards(config.experiments["grpo"]) == {"rm": 0.25, "ifeval": 0.75}
    step = Plan(config).step("train", "grpo_r8.seed2")
    assert step["parents"].keys() == {"start", "rows", "reward rm_r8", "start of rm_r8"}
    assert step["parents"]["reward rm_r8"] == Plan(config).fingerprint("train", "rm_r8.seed2")


@pytest.mark.parametrize(
    ("experiments", "copied"),
    [
        ("dpo: {sweep: rank}", ["dpo"]),  # from the sft_v2 that there is
        ("sft_v2: {sweep: rank}, rm: {sweep: none}", ["dpo", "grpo", "kto", "rloo", "sft_v2"]),  # ppo is made from rm
        ("rm: {sweep: rank}", ["ppo", "rm"]),
        ("dpo: {sweep: rank}, more: {extends: dpo, train: {beta: 0.2}}", ["dpo", "more"]),  # as every key is inherited
        ("dpo: {sweep: rank}, again: {method: kto, start_from: dpo}", ["again", "dpo"]),
        ("sft_v1: {sweep: rank}, dpo: {sweep: rank}, again: {method: kto, start_from: dpo_flipped}", ["dpo", "sft_v1"]),
        ("sft_v2: {sweep: none}", []),
    ],
)
def test_what_is_copied(over, experiments, copied):
    config = over(f"{{sweep_ranks: [4], experiments: {{{experiments}}}}}")
    assert sorted(config.copies.values()) == copied
    start = config.experiments.get("dpo_r4", {}).get("start_from")
    assert start in (None, "sft_v2_r4" if "sft_v2" in copied else "sft_v2")


def test_what_an_experiment_left_out_does_not_stop_an_experiment_that_asks_for_itself(over):
    config = over("experiments: {sft_v2: {sweep: rank}, dpo: {sweep: none}, again: {method: kto, start_from: dpo, sweep: rank}}")
    assert "dpo_r8" not in config.copies and config.experiments["again_r8"]["start_from"] == "dpo"


def test_the_scale_is_that_of_the_global_block(over):
    config = over("{lora: {r: 12, alpha: 12, dropout: 0.1}, experiments: {sft_v2: {sweep: rank}}}")
    assert config.experiments["dpo_r32"]["lora"] == config.data["lora"] | {"r": 32, "alpha": 32}
    assert config.experiments["dpo_r32"]["lora"]["dropout"] == 0.1


def test_only_the_copies_and_the_report_have_other_steps():
    """Every step of the chain has the fingerprint that it has without the sweep, and without the word in any experiment."""
    user = read_yaml(DEFAULT)
    bare = merge(user, {})
    bare["experiments"] = {
        name: {key: value for key, value in body.items() if key != "sweep"} for name, body in user["experiments"].items()
    }
    plain, marked, swept = Plan(Config(bare)), Plan(Config(user)), Plan(load(DEFAULT, SWEEP))
    kinds = [f"{verb}_{task}" for verb in ("generate", "score") for task in plain.config.evaluations]
    steps = [("base", "base")] + [("slice", name) for name in plain.config.data["data"]["slices"]]
    for name in plain.config.experiments:
        steps += [(kind, name) for kind in (["train", "eval_rm"] if name == "rm" else ["train", "merge", *kinds])]
    assert len(steps) > 60
    for step in steps:
        assert plain.fingerprint(*step) == marked.fingerprint(*step) == swept.fingerprint(*step), step
    assert plain.report() == marked.report() != swept.report()
    assert "sweep" not in plain.step("report", "")["config"]
    assert swept.step("report", "")["config"]["sweep"]["dpo_r32"] == {"of": "dpo", "r": 32}
    assert swept.step("report", "")["config"]["sweep"]["dpo"] == {"of": "dpo", "r": 16}
    for name in swept.config.experiments:
        text = swept.train(name)
        assert '"sweep' not in text and json.loads(text)["config"]["lora"]["r"] == (
            int(name.rpartition("_r")[2]) if name in swept.config.copies else 16
        )
    lora = {"r": 8, "alpha": 16, "dropout": 0.05, "bias": "none"}
    assert lora.items() <= swept.step("train", "sft_v2_r8")["config"]["lora"].items()


def test_a_change_of_the_original_or_of_the_global_block_reaches_its_copies(over):
    before = Plan(load(DEFAULT, SWEEP))
    sweep = "sft_v2: {sweep: rank}"
    for overlay, others in (
        (f"experiments: {{{sweep}, dpo: {{train: {{beta: 0.3}}}}}}", {"dpo", "dpo_ipo", "dpo_4bit", "dpo_flipped"}),
        (f"{{methods: {{kto: {{train: {{beta: 0.3}}}}}}, experiments: {{{sweep}}}}}", {"kto"}),
        (f"{{lora: {{dropout: 0.1}}, experiments: {{{sweep}}}}}", set(load(DEFAULT).experiments)),
    ):
        after = Plan(over(overlay))
        changed = {name for name in after.config.experiments if after.train(name) != before.train(name)}
        assert changed == others | {copy for copy, name in after.config.copies.items() if name in others}


# -- what is refused --------------------------------------------------------------------------------------------------

LONG = "a" * 38
RANK = "sft_v2: {sweep: rank}"
REFUSED = {
    f"{{sweep_ranks: [8, 16], experiments: {{{RANK}}}}}": r"sweep_ranks: found 16, which is lora\.r, the rank of the",
    f"{{lora: {{r: 16, alpha: 24}}, sweep_ranks: [5], experiments: {{{RANK}}}}}": r"sweep_ranks: found 5: alpha/r stays 24/16",
    f"{{sweep_ranks: [], experiments: {{{RANK}}}}}": "sweep_ranks: found an empty list, expected a list of at least 1 entries",
    f"{{sweep_ranks: [8, 8], experiments: {{{RANK}}}}}": "sweep_ranks: found a list, expected .*without repetition",
    "sweep_ranks: [0]": "sweep_ranks.0: found 0, expected an integer at least 1",
    f"experiments: {{{RANK}, kto_r8: {{extends: dpo}}}}": (
        "experiments.kto_r8: `sweep: rank` gives this name to the copy of kto with rank 8; rename this experiment, or leave kto"
    ),
    f"experiments: {{{LONG}: {{extends: sft_v2, sweep: rank}}}}": (
        f"experiments.{LONG}: its copy with rank 32 would be called {LONG}_r32, and a name has at most 41 characters"
    ),
    f"experiments: {{{RANK}, dpo: {{lora: {{r: 8}}}}}}": "experiments.dpo.lora.r: refused: .*, or declare a rank sweep with `swe",
    f"{{methods: {{dpo: {{lora: {{r: 8}}}}}}, experiments: {{{RANK}}}}}": "methods.dpo.lora.r: refused",
    "methods: {dpo: {sweep: rank}}": "methods.dpo.sweep: unknown key",
    "experiments: {dpo: {sweep: [4, 8]}}": "experiments.dpo.sweep: found a list, expected one of rank, none",
    f"experiments: {{{RANK}, more: {{method: dpo, start_from: sft_v2_r8}}}}": "experiments.more.start_from: found 'sft_v2_r8', e",
    f"experiments: {{{RANK}, more: {{extends: dpo_r8}}}}": "experiments.more.extends: found 'dpo_r8', expected",
    f"experiments: {{{RANK}, grpo: {{reward: rm_r8}}}}": "experiments.grpo.reward: found 'rm_r8', expected ifeval, numeric or",
    "experiments: {ppo: {sweep: rank, reward: rm}}": (
        "experiments.ppo.reward: found 'rm', which the rank sweep leaves out, and PPO's policy and reward model have adapters"
    ),
}  # fmt: skip


@pytest.mark.parametrize("overlay", REFUSED)
def test_what_is_refused_and_where(over, overlay):
    with pytest.raises(InputError) as caught:
        over(overlay)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 and re.search(rf"overlay\.yaml: {REFUSED[overlay]}", lines[0]), lines


def test_a_rank_of_the_list_may_be_the_global_one_where_nothing_is_swept_and_the_longest_name_fits(over):
    assert over("lora: {r: 8, alpha: 16}").copies == {}
    name = "a" * 37
    assert f"{name}_r32" in over(f"experiments: {{{name}: {{extends: sft_v2, sweep: rank}}}}").experiments


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (
            "families: {primary: {runs: [dpo_r8]}}",
            r"report\.families\.primary: found dpo_r8 \(r 8\) and sft_v2_merged \(r 16\): methods",
        ),
        ("families: {methods: {pairs: [dpo, kto_r32]}}", r"report\.families\.methods: found dpo \(r 16\) and kto_r32 \(r 32\)"),
        ("controls: {negative: {run: dpo_flipped, against: sft_v2_r8}}", r"report\.controls\.negative: found dpo_flipped"),
        ("families: {primary: {reference: sft_v2_r8, runs: [dpo_r8, kto_r8]}}", None),
        ("families: {base: {runs: [sft_v2, dpo_r8, dpo_r32]}}", None),  # each against the base, which has no adapter
        ("families: {methods: {pairs: [dpo, dpo_r8, dpo_r32]}}", None),  # one method: capacity itself
    ],
)
def test_methods_are_judged_at_one_rank_only(over, report, message):
    plan = Plan(over(f"{{experiments: {{{RANK}}}, report: {{{report}}}}}"))
    if message is None:
        plan.check()
        return
    with pytest.raises(InputError, match=rf"overlay\.yaml: {message}"):
        plan.check()


def test_a_key_of_a_copy_is_named_where_it_stands():
    config = load(DEFAULT, SWEEP)
    assert differences.place(config, "train", "dpo_r8", ["train", "beta"]) == "methods.dpo.train.beta"
    assert differences.place(config, "train", "kto_r8.seed2", ["start_from"]) == "experiments.kto.start_from"
    assert differences.place(config, "train", "dpo_r8", ["lora", "dropout"]) == "lora.dropout"


# -- Snakemake --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return make_clone(tmp_path_factory.mktemp("clone") / "phaseline")


@pytest.mark.parametrize("base", ["config", "smollm2", "qwen05b"])
def test_snakemake_plans_a_copy_from_the_copies_of_its_rank(clone, base):
    folder = "results" if base == "config" else f"results/{base}"
    configs = [f"config/{base}.yaml", "config/rank_sweep.yaml"]
    target = [f"{folder}/ifeval_dpo_r8.json"]
    chain = {"slice_data": 4, "make_base": 1, "train_sft": 1, "merge": 1, "train_dpo": 1, "generate": 1, "score": 1}
    chain["slice_data"] = 7 if base == "qwen05b" else 4  # the study's rows are decontaminated against five evaluations
    assert clone.plan(*target, configs=configs) == chain
    done = clone.snakemake("-n", f"{folder}/ppo_r8/adapter/manifest.json", "--quiet", "host", configs=configs)
    made = set(re.findall(rf"output: {folder}/(\w+)/", done.stdout + done.stderr))
    assert made == {"data", "base", "sft_v2_r8", "rm_r8", "ppo_r8"}


def test_the_default_target_has_the_copies_and_the_chain(clone):
    planned = clone.plan("all", configs=["config/config.yaml", "config/rank_sweep.yaml"])
    assert (planned["train_sft"], planned["train_ppo"], planned["train_dpo"], planned["merge"]) == (4, 4, 6, 3)


# -- for real ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return Plan(load(DEFAULT, MICRO, SWEEP))


def settings(adapter) -> dict:
    return json.loads((adapter.folder / "adapter_config.json").read_text())


@pytest.mark.slow
def test_adapters_of_rank_8_are_trained_merged_and_built_upon(tmp_path, plan):
    """SFT, its merge, and on that DPO, a reward model and PPO, whose three adapters all have rank 8."""
    from workflow_scripts.rl import ppo_trainer

    base = small_steps.write_base(tmp_path / "base")
    data = tmp_path / "data"
    rows = {
        "sft": small_steps.sft_slice(data),
        "pairs": small_steps.pairs_slice(data),
        "ppo": small_steps.instructions_slice(data),
    }

    def train(name: str, start, slice_name: str, **models):
        step = plan.step("train", name)
        step["config"]["optim"] = "adamw_torch"
        parents = {"start": start, "rows": rows[slice_name], **models}
        return small_steps.run(small_steps.job(step["step"], tmp_path / name / "adapter/manifest.json", parents, step["config"]))

    sft = train("sft_v2_r8", base, "sft")
    merged = small_steps.merge(tmp_path / "sft_v2_r8", base, sft.path)
    dpo = train("dpo_r8", merged.path, "pairs")
    rm = train("rm_r8", merged.path, "pairs")
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        right = ppo_trainer.PPOTrainer.add_reward_model
        patch.setattr(ppo_trainer.PPOTrainer, "add_reward_model", lambda self, *args: (kept.append(self), right(self, *args)))
        ppo = train("ppo_r8", merged.path, "ppo", **{"start of rm_r8": merged.path, "reward rm_r8": rm.path})
    inputs_and_outputs = 2 * (64 + 48 + 48 + 64 + 96 + 96 + 96)  # of the matrices of two layers
    for adapter in (sft, dpo, rm, ppo):
        assert (settings(adapter)["r"], settings(adapter)["lora_alpha"]) == (8, 16)
        head = 32 if adapter is rm else 0
        assert adapter.data["constant"]["trainable_parameters"] == 8 * inputs_and_outputs + head
        assert adapter.data["adapter_moved"] == 1.0 or adapter is ppo
    assert merged.data["logits_from_full_precision_base_and_adapter"]["max_abs"] < 1e-5
    assert dpo.data["base"]["weights_sha256"] == merged.weights_sha256
    assert {name: block.r for name, block in kept[0].model.peft_config.items()} == {
        "default": 8, "value": 8, "reward_rm_r8": 8,
    }  # fmt: skip


# -- the report -------------------------------------------------------------------------------------------------------


def section(html: str) -> str:
    return html[html.index('<h2 id="capacity">') : html.index('<h2 id="kinds">')]


@pytest.mark.slow
def test_the_report_shows_capacity_against_accuracy_where_a_sweep_is_declared(tmp_path):
    accuracy = {"dpo_r8": 0.55, "dpo_r32": 0.8}
    config = report_world.write_config(tmp_path, overlay=yaml.safe_load(SWEEP.read_text()))
    plan = report_world.make(tmp_path, config, accuracy=accuracy)
    page = section(report_world.report(tmp_path, plan))
    assert "Descriptive" in page and page.count("<svg") == 1 and "rank of the adapters, r" in page
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr><td>(?:.*?)</tr>", page)]
    answering = sorted(set(CHAIN) - {"rm"})
    assert [(row[0], int(row[2])) for row in rows] == [(name, rank) for name in answering for rank in (8, 16, 32)]
    for of, name, rank, parameters, mean, each in rows:
        runs = [name, f"{name}.seed2", f"{name}.seed3"]
        scores = [json.loads((tmp_path / f"results/ifeval_{run}.json").read_text())["prompt_level_strict_acc"] for run in runs]
        assert name == (of if rank == "16" else f"{of}_r{rank}") and parameters == f"{9728 * int(rank):,}"
        assert each == ", ".join(f"{100 * score:.1f}" for score in scores)
        assert mean.startswith(f"{100 * sum(scores) / 3:.1f} +- ")
    dpo = [float(row[4].split(" ")[0]) for row in rows if row[0] == "dpo"]
    assert dpo == sorted(dpo)
