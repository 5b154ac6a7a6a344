"""The study's config and the example for one's own: they say what the design says, plan, and fail clearly without a hub."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import Clone, make_clone
from tests.support import cpu, small_steps
from workflow_scripts.config.config import load
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import pin

ROOT = Path(__file__).resolve().parents[2]
LARGE = ROOT / "config/qwen7b.yaml"
STUDY, EXAMPLE = ROOT / "config/qwen05b.yaml", ROOT / "config/example_own.yaml"
CHAIN = {"slice_data": 4, "make_base": 1, "train_sft": 1, "merge": 1, "train_dpo": 1, "generate": 1, "score": 1}


@pytest.fixture(scope="module")
def study():
    return Plan(load(STUDY))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone to plan in, so that nothing is left in the repository. No job runs in it."""
    return make_clone(tmp_path_factory.mktemp("clone") / "phaseline").folder


def snakemake(folder: Path, *args: str, **more: str) -> subprocess.CompletedProcess:
    clone = Clone(folder)
    clone.variables |= more
    return clone.run("snakemake", *args, check=False)


def test_the_study_has_the_numbers_of_its_design(study):
    experiments = study.config.experiments
    others = {"kto", "rm", "ppo", "grpo", "rloo", "grpo_if", "rloo_if", "grpo_rm", "rloo_rm"}
    others |= {"grpo_random", "grpo_shuffled"}
    on_own, on_pairs = {"rft", "dpo_onpolicy"}, {"dpo", "dpo_ipo", "dpo_hinge", "dpo_4bit", "dpo_flipped", "simpo", "orpo"}
    assert set(experiments) == {"sft_v1", "sft_v2"} | on_pairs | others | on_own
    common = {"num_train_epochs": 1, "warmup_steps": 0.03, "lr_scheduler_type": "cosine", "gradient_checkpointing": True}
    for name, body in experiments.items():
        train = body["train"]
        assert {key: train[key] for key in common} == common, name
        shape = (train["per_device_train_batch_size"], train["gradient_accumulation_steps"])
        if body["method"] == "sft":
            assert (train["learning_rate"], shape, train["max_length"]) == (2.0e-4, (4, 4), 2048)
            assert body["quantise"] == "nf4" and body["start_from"] == ("sft_v2" if name in on_own else "base")
        elif name in others:
            assert body["quantise"] == "nf4" and body["start_from"] == "sft_v2"
            assert train["learning_rate"] == (5.0e-5 if name == "rm" else 5.0e-6)
            assert shape == ((8, 2) if name == "ppo" else (8, 4) if "reward" in body else (4, 4))
            room = 1024 if name in ("grpo_if", "rloo_if") else 512  # the longest instruction asks for 500 words
            assert "reward" not in body or train["max_completion_length"] == room
        else:
            assert (train["learning_rate"], shape, train["max_length"]) == (5.0e-6, (2, 8), 1024)
            assert train["beta"] == (2.0 if name == "simpo" else 0.1)
            nf4 = name in ("dpo_4bit", "simpo", "orpo")
            assert body["quantise"] == ("nf4" if nf4 else "none") and body["start_from"] == "sft_v2"
    assert [experiments[name]["train"]["assistant_only_loss"] for name in ("sft_v1", "sft_v2")] == [False, True]
    assert experiments["kto"]["train"]["beta"] == 0.1 and experiments["kto"]["class_weights"] == "ratio"
    for name in ("grpo", "rloo"):
        train = experiments[name]["train"]
        assert (train["num_generations"], train["beta"], train["temperature"]) == (4, 0.05, 1.0)
        assert experiments[name]["reward"] == "numeric"
    assert experiments["grpo"]["train"]["loss_type"] == "grpo"
    ppo, train = experiments["ppo"]["ppo"], experiments["ppo"]["train"]
    assert (ppo["kl_coef"], ppo["gamma"], ppo["lam"], ppo["value_learning_rate"]) == (0.05, 1.0, 0.95, 1.0e-5)
    assert train["per_device_train_batch_size"] * train["steps_per_generation"] == 64
    assert (train["num_iterations"], train["epsilon"], train["temperature"]) == (4, 0.2, 1.0)
    assert experiments["ppo"]["reward"] == "rm" and experiments["ppo"]["slice"] == "prompts"
    losses = {name: experiments[name]["train"]["loss_type"] for name in experiments if name.startswith("dpo")}
    plain = dict.fromkeys(("dpo", "dpo_4bit", "dpo_flipped", "dpo_onpolicy"), "sigmoid")
    assert losses == plain | {"dpo_ipo": "ipo", "dpo_hinge": "hinge"}
    slices = study.config.data["data"]["slices"]
    assert (slices["sft"]["source"]["hub"], slices["sft"]["source"]["split"]) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert (slices["pairs"]["source"]["hub"], slices["pairs"]["source"]["split"]) == (
        "HuggingFaceH4/ultrafeedback_binarized", "train_prefs",
    )  # fmt: skip
    assert all(slices[name]["rows"] - slices[name]["heldout"] == 5000 for name in ("sft", "pairs"))
    assert (
        slices["prompts"]["rows"] - slices["prompts"]["heldout"] == 2000 and slices["prompts"]["seed"] != slices["pairs"]["seed"]
    )
    assert slices["gsm8k_train"]["rows"] - slices["gsm8k_train"]["heldout"] == 2000 and slices["gsm8k_test"]["rows"] == 1319
    assert slices["ifeval"]["rows"] == len((ROOT / "data/ifeval/input_data.jsonl").read_text().splitlines()) == 541
    assert study.config.data["eval"]["ifeval"]["max_new_tokens"] == 1280
    assert (slices["mmlu"]["rows"], slices["mmlu_dev"]["rows"], slices["truthfulqa"]["rows"]) == (14042, 57 * 5, 817)
    mmlu = study.config.data["eval"]["mmlu"]
    assert mmlu["shots"] == 5 and mmlu["apply_chat_template"] and study.config.data["eval"]["truthfulqa"]["apply_chat_template"]
    assert study.config.data["pathvars"] == {name: f"{name}/qwen05b" for name in ("results", "logs", "benchmarks")}
    assert (study.config.data["device"], study.config.data["precision"]) == ("cuda", "bf16")


def test_a_prompt_that_is_kept_leaves_room_for_an_answer(study):
    for slice_name, run in (("sft", "sft_v2"), ("pairs", "dpo")):
        limit = study.step("slice", slice_name)["config"]["max_prompt_tokens"]
        assert limit < study.step("train", run)["config"]["train"]["max_length"]
    assert study.step("slice", "sft")["config"]["max_prompt_tokens"] == 2047
    assert "max_prompt_tokens" not in study.step("slice", "ifeval")["config"]


def test_evaluation_prompts_have_no_limit_of_their_own(tmp_path):
    (tmp_path / "over.yaml").write_text("data: {slices: {ifeval: {max_prompt_tokens: 9}}}")
    with pytest.raises(InputError, match=r"over.yaml: data.slices.ifeval.max_prompt_tokens: .* leave the key out"):
        load(STUDY, tmp_path / "over.yaml")


@pytest.mark.parametrize("path", [STUDY, EXAMPLE], ids=lambda path: path.name)
def test_everything_of_a_hub_is_pinned(path):
    found = pin.places(path.read_text())
    assert {place.id for place in found} >= {"Qwen/Qwen2.5-0.5B"}
    assert all(place.pinned for place in found)
    assert len(found) == (11 if path == STUDY else 1)
    assert "allow_unpinned" not in path.read_text()


def test_a_moved_revision_makes_what_comes_from_it_stale(study, tmp_path):
    text = STUDY.read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("3949bf5f8c17c394422ccfab0c31ea9c20bdeb85", "a" * 40, 2))  # not that of the judge's prompts
    moved = Plan(load(other))
    changed = {
        step
        for step in [
            ("base", "base"), ("slice", "sft"), ("slice", "pairs"), ("train", "sft_v2"), ("train", "dpo"), ("train", "ppo"),
        ]
        if study.fingerprint(*step) != moved.fingerprint(*step)
    }  # fmt: skip
    assert changed == {("slice", "pairs"), ("train", "dpo"), ("train", "ppo")}


def test_the_7b_overlay_is_the_study_on_another_base_at_the_same_effective_batch(study, clone):
    large = Plan(load(STUDY, LARGE))
    for name, body in large.config.experiments.items():
        mine, theirs = body["train"], study.config.experiments[name]["train"]
        rows = {id(one): one["per_device_train_batch_size"] * one["gradient_accumulation_steps"] for one in (mine, theirs)}
        rollout = {id(one): one["per_device_train_batch_size"] * one.get("steps_per_generation", 0) for one in (mine, theirs)}
        assert rows[id(mine)] == rows[id(theirs)] and rollout[id(mine)] == rollout[id(theirs)], name
        assert mine["learning_rate"] == theirs["learning_rate"] and mine.get("max_length") == theirs.get("max_length")
    kto = [plan.config.experiments["kto"]["train"]["per_device_train_batch_size"] for plan in (study, large)]
    assert kto[0] == kto[1] and large.config.data["lora"] == study.config.data["lora"] | {"r": 8, "alpha": 16}
    models = pin.places(LARGE.read_text())
    assert [place.id for place in models] == ["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"] and all(one.pinned for one in models)
    files = ["config/qwen05b.yaml", "config/qwen7b.yaml"]
    done = snakemake(clone, "-n", "results/qwen7b/ifeval_dpo.json", "--configfile", *files, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert planned(done) == CHAIN | {"slice_data": 7}


def test_the_study_plans_without_a_hub_and_any_run_can_be_fused(clone):
    for target, jobs in {
        "results/qwen05b/ifeval_dpo.json": CHAIN | {"slice_data": 7},  # training rows are decontaminated against five evaluations
        "results/qwen05b/mmlu_base.json": {"slice_data": 2, "make_base": 1, "lm_eval_task": 1},
        "results/qwen05b/dpo/merged/manifest.json": {
            "slice_data": 7, "make_base": 1, "train_sft": 1, "merge": 2, "train_dpo": 1,
        },
    }.items():  # fmt: skip
        done = snakemake(clone, "-n", target, "--configfile", "config/qwen05b.yaml", HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        assert planned(done) == jobs


def planned(done: subprocess.CompletedProcess) -> dict[str, int]:
    table = (done.stdout + done.stderr).split("Job stats:")[-1]
    jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, flags=re.M)}
    jobs.pop("total")
    return jobs


def test_without_a_hub_a_real_run_ends_at_once_with_the_model_and_three_remedies(clone, tmp_path):
    before = cpu.seconds()
    done = snakemake(
        clone, "--cores", "1", "results/qwen05b/ifeval_dpo.json", "--configfile", "config/qwen05b.yaml",
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"),
    )  # fmt: skip
    assert cpu.seconds() - before < 10
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "060db6499f32faf8b98477b0a26969ef7d8b9987" in line]
    assert len(lines) == 1 and "Qwen/Qwen2.5-0.5B" in lines[0]
    assert all(mark in lines[0] for mark in ("(1)", "(2)", "(3)", "HF_HOME", "HF_HUB_OFFLINE"))
    assert [path.name for path in (clone / "results/qwen05b").iterdir()] == [".work"]  # no job ran


# -- one's own -------------------------------------------------------------------------------------------------------

QUESTION = {"key": 7, "prompt": "Name three rivers.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}
HH = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."}


@pytest.fixture
def mine(tmp_path):
    """The example with everything of one's own: a model folder, data in other formats, own prompts. Returns the file."""
    small_steps.write_base(tmp_path / "model").unlink()  # a model folder has no manifest of ours
    for name, row in {"talk.jsonl": SHAREGPT, "prompts.jsonl": QUESTION}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    (tmp_path / "pairs.json").write_text(json.dumps([HH] * 20))
    text = EXAMPLE.read_text()

    def put(old: str, new: str) -> None:
        nonlocal text
        assert text.count(old) == 1, old
        text = text.replace(old, new)

    put("results: results/mine", f"results: {tmp_path}/results")
    put("device: cuda ", "device: cpu ")
    put("precision: bf16            # <- YOURS", "precision: fp32            # <- YOURS")
    put("source: hub\n", "source: path\n")
    put("  hub: {id: Qwen/Qwen2.5-0.5B", "  # hub: {id: Qwen/Qwen2.5-0.5B")
    put("# path: models/mine ", f"path: {tmp_path}/model ")
    put("source: {path: data/sft/oasst_en_conversations.jsonl}", f"source: {{path: {tmp_path}/talk.jsonl}}")
    put("source: {path: data/preference/oasst_en_ranked_pairs.jsonl}", f"source: {{path: {tmp_path}/pairs.json}}")
    put("source: {path: data/ifeval/input_data.jsonl}", f"source: {{path: {tmp_path}/prompts.jsonl}}")
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path / "mine.yaml"


@pytest.mark.slow
def test_the_example_runs_from_its_marked_lines_on_ones_own_files(mine, clone):
    done = snakemake(clone, "-n", f"{mine.parent}/results/ifeval_dpo.json", "--configfile", str(mine))
    assert done.returncode == 0, done.stdout + done.stderr
    assert planned(done) == CHAIN | {"slice_data": 3}
    text = mine.read_text().replace(f"{mine.parent}/talk.jsonl", f"{mine.parent}/tolk.jsonl")
    mine.write_text(text)
    done = snakemake(clone, "-n", f"{mine.parent}/results/ifeval_dpo.json", "--configfile", str(mine))
    assert done.returncode != 0
    assert f"data.slices.sft.source.path: {mine.parent}/tolk.jsonl: cannot be read: No such file" in done.stderr


def test_the_example_as_it_ships_plans(clone):
    done = snakemake(clone, "-n", "results/mine/ifeval_dpo.json", "--configfile", "config/example_own.yaml", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert planned(done) == CHAIN | {"slice_data": 3}


def test_the_page_on_own_data_names_the_formats_that_exist_and_no_others():
    from workflow_scripts.data import formats

    text = (ROOT / "docs/your-data.md").read_text()
    rows = re.findall(
        r"^\| (`\w+`)? ?\| ((?:`\w+`(?:, )?)+) \|", text.split("## The rows")[1].split("## The evaluation")[0], flags=re.M
    )
    named: dict[str, set[str]] = {}
    kind = ""
    for first, second in rows:
        kind = first.strip("`") or kind
        named.setdefault(kind, set()).update(re.findall(r"`(\w+)`", second))
    assert named == {
        kind: set(formats.names(kind)) for kind in ("sft", "preference", "unpaired", "numeric", "choice", "truthfulqa", "prompts")
    }


def test_the_prompt_on_the_page_can_be_scored():
    from workflow_scripts.evaluation import ifeval

    text = (ROOT / "docs/your-data.md").read_text()
    row = json.loads(re.search(r"^\{\"key\".*$", text, flags=re.M)[0])
    scores = ifeval.score([row], [{"prompt": row["prompt"], "response": "Rhine " * 25}], False, "prompts", "responses")
    assert scores["prompt_level_strict_acc"] == 1.0
    fails = ifeval.score([row], [{"prompt": row["prompt"], "response": "Rhine, Elbe"}], False, "prompts", "responses")
    assert fails["inst_level_strict_acc"] == 0.0


def test_every_key_of_the_examples_comments_is_one_that_the_schema_knows(tmp_path):
    text = EXAMPLE.read_text()
    for old, new in {
        "# path: models/mine": "path: models/mine",
        "# training_template: models/mine.jinja": "training_template: chatml_text",
        "# group_by: tree_id": "group_by: tree_id",
        "# format: sharegpt": "format: messages",
        '# gguf: {file: models/mine.gguf, sha256: "..."}': 'gguf: {file: models/mine.gguf, sha256: "' + "0" * 64 + '"}',
        "# methods: ": "methods: ",
        "#   dpo: {train": "  dpo: {train",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "all.yaml").write_text(text)
    config = load(tmp_path / "all.yaml")
    assert config.experiments["dpo"]["train"]["learning_rate"] == 1.0e-5
    hub = yaml.safe_load(re.search(r"# source: (\{hub.*\})", text)[1].replace("<40 hex digits>", "a" * 40))
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump({"data": {"slices": {"more": {
        "kind": "sft", "source": hub, "rows": 9, "heldout": 1, "seed": 1}}}}))  # fmt: skip
    assert load(EXAMPLE, tmp_path / "hub.yaml").data["data"]["slices"]["more"]["source"] == hub
