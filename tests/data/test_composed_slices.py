"""Slices of composed prompts, from the config to the rows: who keeps away from whom, and what is said of too few questions."""

import json
import random
from pathlib import Path

import pytest

from tests.support.planned import ROOT, fingerprints, stale
from tests.support.slicer import lines
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.data import hub, slicing
from workflow_scripts.data.questions import part_of
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import slice_data
from workflow_scripts.tools import explain, graph

IFEVAL = [json.loads(line) for line in (ROOT / "data/ifeval/input_data.jsonl").read_text(encoding="utf-8").splitlines()]
RULE = {"rule": "ngram", "ngram": 8, "share": 0.5}
COMMIT = "0" * 40


def question_rows(n: int) -> list[dict]:
    """Rows with `n` questions of 30 words that no evaluation has."""
    rng = random.Random(3)
    letters = "bcdfghjklmnprstvwz"
    word = lambda: "".join(rng.choice(letters) + rng.choice("aeiou") for _ in range(3))  # noqa: E731
    return [{"prompt": " ".join(word() for _ in range(30)) + "?", "chosen": "yes", "rejected": "no"} for _ in range(n)]


def composed_job(slicer, given: list[dict], out: str = "made", heldout: int = 0, rows: int = 20, **composed) -> manifests.Job:
    """A job of `main` as the plan would make it, over parents made by hand: IFEval's own prompts and a base."""
    prompts = [row | {"id": f"p:{i}"} for i, row in enumerate(IFEVAL)]
    slicer.parent("ifeval_prompts", slicer.results / "data/ifeval.manifest.json", "ifeval.jsonl", lines(prompts))
    job = slicer.job(given, "sft", rows=rows, decontaminate=RULE, heldout=heldout, max_prompt_tokens=10_000)
    source = {"questions": job.config["source"], "read": 1000, "part": "train", "instructions": 3, "max_words": 60} | composed
    job.config.update(kind="ifeval", source={"composed": source})
    if not heldout:
        for key in ("heldout", "max_drop", "max_prompt_tokens"):
            del job.config[key]
        del job.step["parents"]["base"]
    picked = slicing.candidates([str(job.inputs[0])], source["read"], job.config["seed"], "ifeval")
    job.step["external"] = {"candidate_rows": slicing.rows_hash(picked)}
    job.out = slicer.results / f"data/{out}.manifest.json"
    return job


def made(job: manifests.Job) -> manifests.Artifact:
    job.limits = {}
    slice_data.main(job)
    return manifests.read(job.out)


def test_a_slice_to_train_on_and_one_to_choose_on_have_no_question_in_common(slicer):
    rows = question_rows(200)
    train = made(composed_job(slicer, rows, heldout=5, rows=100))
    dev = made(composed_job(slicer, rows, out="dev", part="dev", rows=20))
    asked = {row["prompt"]: [one["prompt"].startswith(row["prompt"]) for one in train.rows()] for row in rows}
    also = {row["prompt"]: [one["prompt"].startswith(row["prompt"]) for one in dev.rows()] for row in rows}
    assert sum(map(sum, asked.values())) == 100 and sum(map(sum, also.values())) == 20
    assert not any(any(asked[text]) and any(also[text]) for text in asked)
    assert sum(row["heldout"] for row in train.rows()) == 5 and all("heldout" not in row for row in dev.rows())
    assert train.data["rows"] == {"candidates": 200, "kept": 100, "heldout": 5}
    facts = train.data["composed"]
    assert facts["prompts"] == 100 and facts["questions"] + facts["left_out"]["of the other part"] == 200
    assert sum(facts["instructions"].values()) == 100


def test_the_same_step_gives_the_same_bytes_whatever_was_drawn_before(slicer):
    job = composed_job(slicer, question_rows(60), heldout=2)
    random.seed(1)
    first = made(job).file("made.jsonl").read_bytes()
    random.seed(2)
    assert made(job).file("made.jsonl").read_bytes() == first


def test_questions_that_are_in_ifeval_give_no_prompt(slicer):
    planted = [{"prompt": row["prompt"], "chosen": "a", "rejected": "b"} for row in IFEVAL[:60]]
    train = made(composed_job(slicer, [*planted, *question_rows(60)], heldout=2, rows=30))
    texts = {row["prompt"] for row in planted}
    assert not any(row["prompt"].startswith(text) for row in train.rows() for text in texts)


def test_a_question_too_long_for_the_model_is_dropped_and_counted(slicer):
    job = composed_job(slicer, question_rows(80), heldout=2, rows=30)
    job.config.update(max_prompt_tokens=5, max_drop=0.5)
    with pytest.raises(InputError, match="30 of 30 rows .100.0%. can't be used: 30 with a prompt above 5 tokens"):
        made(job)


def test_too_few_questions_stop_the_step_with_its_file(slicer):
    job = composed_job(slicer, question_rows(30), heldout=2, rows=30)
    with pytest.raises(InputError, match=r"mine.jsonl: \d+ prompts can be made of 30 rows, .* asks for 30 .*of the other part"):
        made(job)


# -- planned ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """The default config with composed prompts of a file of 100 questions, to train on and to choose on."""
    (tmp_path / "mine.jsonl").write_bytes(lines(question_rows(100)))
    body = {"questions": {"path": str(tmp_path / "mine.jsonl")}, "read": 100, "part": "train", "instructions": 3, "max_words": 60}
    given = read_yaml(ROOT / "config/config.yaml")
    given["pathvars"]["results"] = str(tmp_path / "results")
    given["data"]["slices"] |= {
        "composed": {"kind": "ifeval", "source": {"composed": body}, "rows": 40, "heldout": 5, "seed": 1},
        "chosen_on": {"kind": "ifeval", "source": {"composed": body | {"part": "dev"}}, "rows": 10, "seed": 1},
        "more": {"kind": "ifeval", "source": {"path": str(ROOT / "data/ifeval/input_data.jsonl")}, "rows": 541, "seed": 1},
    }
    given["experiments"]["grpo_if"] = {"extends": "grpo", "slice": "composed"}
    return given


def error(config: dict, overlay: dict) -> str:
    with pytest.raises(InputError) as caught:
        Plan(Config(merge(config, overlay))).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of(**source) -> dict:
    return {"data": {"slices": {"composed": {"source": {"composed": source}}}}}


def test_composed_prompts_keep_away_from_every_slice_to_evaluate_on_and_not_from_each_other(config):
    plan = Plan(Config(config))
    away = {"ifeval_prompts": "ifeval", "gsm8k_prompts": "sums_eval", "slice_more_prompts": "more"}
    assert plan.avoided("composed") == plan.avoided("chosen_on") == away
    assert plan.avoided("pairs") == {"ifeval_prompts": "ifeval", "gsm8k_prompts": "sums_eval"} and plan.avoided("more") == {}
    assert set(plan.step("slice", "composed")["parents"]) == {*away, "base"}
    # evaluated on, the prompts for development are still none of IFEval's, and pairs keep away from them
    other = Plan(Config(merge(config, {"eval": {"ifeval": {"prompts": "chosen_on"}}})))
    assert set(other.avoided("chosen_on").values()) == {"sums_eval", "ifeval", "more"}
    assert other.avoided("pairs")["ifeval_prompts"] == "chosen_on"
    for one in (plan, other):
        for name in one.config.data["data"]["slices"]:
            phase = graph.Phase("slice", name)
            named = {role: one.fingerprint(*parent) for role, parent in graph.parents(one, phase).items()}
            assert one.step("slice", name)["parents"] == named


def test_prompts_to_choose_by_and_composed_ones_to_judge_by_end_in_no_loop(config):
    """Who chooses keeps away from what is judged, and composed prompts from all that is there to evaluate on: not both ways."""
    tune = {"trials": 2, "grid": {"train": {"learning_rate": {"times": [1, 3]}}}, "experiments": {"dpo": {}}, "per_seed": True}
    over = {"eval": {"ifeval": {"prompts": "chosen_on"}}, "tune": tune | {"choose": {"task": "ifeval", "prompts": "more"}}}
    plan = Plan(Config(merge(config, over)))
    plan.check()
    assert set(plan.avoided("more").values()) == {"chosen_on", "sums_eval"}
    assert set(plan.avoided("chosen_on").values()) == {"ifeval", "sums_eval"}
    assert set(plan.avoided("composed").values()) == {"ifeval", "sums_eval", "more"}  # from chosen_on by its questions


@pytest.mark.parametrize("prompts", ["chosen_on", "more"])
def test_rows_to_train_on_keep_away_from_the_prompts_that_choose(config, prompts):
    """Who was trained on what chooses would be chosen for it. Composed prompts of the other part need not, by their questions."""
    tune = {"trials": 2, "grid": {"train": {"learning_rate": {"times": [1, 3]}}}, "experiments": {"dpo": {}}, "per_seed": True}
    chosen = Config(merge(config, {"tune": tune | {"choose": {"task": "ifeval", "prompts": prompts}}}))
    before, plan = Plan(Config(config)), Plan(chosen)
    plan.check()
    for name in ("sft", "pairs", "rm_pairs"):
        assert plan.avoided(name) == before.avoided(name) | {"dev_prompts": prompts}
        assert plan.step("slice", name)["parents"]["dev_prompts"] == plan.fingerprint("slice", prompts)
        assert plan.step("slice", name)["parents"] == {
            role: plan.fingerprint(*parent) for role, parent in graph.parents(plan, graph.Phase("slice", name)).items()
        }
    assert plan.avoided("composed") == before.avoided("composed")
    assert explain._role_key(plan, graph.Phase("slice", "pairs"), "dev_prompts") == "tune.choose.prompts"


def test_composed_prompts_to_judge_or_choose_by_are_of_a_part_that_nothing_else_in_use_has(config):
    tune = {"trials": 2, "grid": {"train": {"learning_rate": {"times": [1, 3]}}}, "experiments": {"dpo": {}}, "per_seed": True}
    chosen = {"tune": tune | {"choose": {"task": "ifeval", "prompts": "chosen_on"}}}
    judged = {"eval": {"ifeval": {"prompts": "chosen_on"}}}
    place = "data.slices.composed.source.composed.part: found dev, which is also the part of chosen_on, by which "
    small = {"data": {"slices": {"composed": {"rows": 10}}}}
    assert f"{place}trials are chosen: both may have" in error(config, merge(merge(of(part="dev"), small), chosen))
    assert f"{place}ifeval is judged: both may have" in error(config, merge(merge(of(part="dev"), small), judged))
    del config["experiments"]["grpo_if"]  # where nothing trains on it, nothing is shared
    Plan(Config(merge(config, merge(merge(of(part="dev"), small), judged)))).check()
    other = {"data": {"slices": {"others": config["data"]["slices"]["chosen_on"] | {"seed": 2}}}}
    both = merge(merge(judged, other), {"tune": tune | {"choose": {"task": "ifeval", "prompts": "others"}}})
    assert "others.source.composed.part: found dev, which is also the part of chosen_on" in error(config, both)


def test_lm_eval_and_the_code_that_composes_count_for_composed_slices_alone(config):
    plan = Plan(Config(config))
    for name, wanted in {"composed": True, "chosen_on": True, "pairs": False, "ifeval": False, "more": False}.items():
        step = plan.step("slice", name)
        assert ("evaluation.compose" in step["code"], "lm-eval" in step["packages"]) == (wanted, wanted)


def test_what_composes_a_slice_makes_it_stale_and_nothing_else(config, tmp_path):
    before = fingerprints(config)
    trained = {(kind, "grpo_if") for kind in ("train", "merge")}
    assert ("slice", "composed") in before
    for key, value in (("instructions", 2), ("kinds", ["punctuation:no_comma"]), ("max_words", 50), ("read", 90)):
        assert stale(before, fingerprints(merge(config, of(**{key: value})))) == {("slice", "composed")}, key
    both = {("slice", "composed"), ("slice", "chosen_on")}
    path = tmp_path / "mine.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"yes"', b'"yes!"', 1))
    assert stale(before, fingerprints(config)) == both and not trained & set(before)


def test_an_instruction_that_lm_eval_does_not_know_is_refused_with_those_it_knows(config):
    said = error(config, of(kinds=["punctuation:no_comma", "punctuation:no_dots"]))
    assert (
        "data.slices.composed.source.composed.kinds.1: found the string 'punctuation:no_dots', expected one of change_case:"
        in said
    )
    assert "startend:quotation (a kind of instruction that lm-eval knows)" in said


def test_fewer_questions_than_rows_are_told_before_anything_runs(config, tmp_path):
    said = error(config, {"data": {"slices": {"composed": {"rows": 95}}}})
    found = sum(part_of(row["prompt"]) == "train" for row in question_rows(100))
    assert found < 95 and "data.slices.composed.source.composed.questions.path: " in said
    assert f"{found} prompts can be made of 100 rows, one a question, and `rows` asks for 95 (left out: {100 - found} of" in said
    said = error(config, of(read=39))
    assert "data.slices.composed.source.composed.read: found 39, expected at least rows (40)" in said
    said = error(config, of(max_words=10))
    assert "0 prompts can be made of 100 rows" in said and "100 with a question above 10 words" in said


def test_other_mistakes_name_their_key(config, tmp_path):
    place = "data.slices.composed"
    assert f"{place}.kind: found sft, expected ifeval" in error(config, {"data": {"slices": {"composed": {"kind": "sft"}}}})
    said = error(config, of(part="test"))
    assert f"{place}.source.composed.part: found the string 'test', expected one of train, dev" in said
    said = error(config, of(instructions=4))
    assert f"{place}.source.composed.instructions: found 4, expected an integer at least 1 at most 3" in said
    said = error(config, of(questions={"hub": "a/b", "split": "train", "shuffle_buffer": 1}))
    assert f"{place}.source.composed.questions: found the keys" in said
    config["data"]["slices"]["composed"]["source"]["composed"]["questions"] = {
        "hub": "a/b",
        "split": "train",
        "shuffle_buffer": 1,
    }
    assert f"{place}.source.composed.questions.revision: missing; name the full commit" in error(config, {})


def test_what_a_composed_slice_takes_from_a_hub_is_asked_for_before_the_first_job(config):
    source = {"hub": "a/b", "split": "train", "shuffle_buffer": 1, "revision": COMMIT}
    config["data"]["slices"]["composed"]["source"]["composed"]["questions"] = source
    step = Plan(Config(config)).step("slice", "composed")
    assert hub.needed(step) == ("data.slices", "dataset", "a/b", COMMIT)
    assert step["external"] == {"hub": "a/b", "revision": COMMIT, "split": "train"} and "datasets" in step["packages"]


@pytest.mark.parametrize("name", ["smollm2", "qwen05b"])
def test_the_shipped_configs_train_on_composed_prompts_and_keep_them_out_of_the_confirmatory_family(name):
    plan = Plan(Config(read_yaml(ROOT / f"config/{name}.yaml"), [str(Path("config") / f"{name}.yaml")]))
    plan.check()
    data = plan.config.data
    parts = {one: data["data"]["slices"][one]["source"]["composed"]["part"] for one in ("instructions", "instructions_dev")}
    assert parts == {"instructions": "train", "instructions_dev": "dev"}
    for run in ("grpo_if", "rloo_if"):
        assert plan.config.experiments[run]["slice"] == "instructions" and plan.config.experiments[run]["reward"] == "ifeval"
        families = [one for one, family in data["report"]["families"].items() if run in str(family)]
        assert set(families) <= {"instructions", "placebo"} and "instructions" in families
        assert data["report"]["confirmatory"] != "instructions"
