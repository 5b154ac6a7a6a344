"""What makes a phase stale, for each edit of the config and of a local source: exactly these steps and no others."""

import json
import os

import pytest

from tests.conftest import ROOT
from tests.support.planned import (
    ALL_RUNS,
    BELOW_BASE,
    DPO,
    EVALS,
    EVERYTHING,
    RM,
    SLICES,
    config_over_a_local_file,
    evals,
    fingerprints,
    runs,
    stale,
)
from workflow_scripts.config import config
from workflow_scripts.config.config import Config
from workflow_scripts.config.written import merge
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError


@pytest.fixture
def user(tmp_path):
    return config_over_a_local_file(tmp_path)


PAIRS = {("slice", "pairs")} | runs(*DPO, "kto")  # what trains on the pairs; the reward model has its own

EDITS = {
    "methods: {dpo: {train: {beta: 0.27}}}": runs(*DPO),
    "experiments: {dpo: {train: {beta: 0.27}}}": runs(*DPO),  # the other two extend it
    "experiments: {dpo_ipo: {train: {beta: 0.27}}}": runs("dpo_ipo"),
    "experiments: {dpo: {quantise: nf4}}": runs("dpo", "dpo_ipo", "dpo.seed2"),  # dpo_4bit has it already
    "experiments: {dpo: {start_from: sft_v1}}": runs(*DPO),
    "experiments: {sft_v1: {train: {max_length: 101}}}": runs("sft_v1"),
    "methods: {sft: {train: {learning_rate: 1.7e-3}}}": ALL_RUNS,
    "lora: {r: 8}": ALL_RUNS,
    "quant: {double: false}": ALL_RUNS,
    "generation: {backend: hf}": EVALS,
    "generation: {rollouts: hf}": runs("ppo", "ppo_ifeval", "grpo", "grpo_numeric", "rloo"),
    "generation: {slots: 9}": set(),
    "eval: {batch_size: 51}": set(),  # of the backend hf
    "eval: {precision: bf16}": EVALS,
    "eval: {ifeval: {max_new_tokens: 33}}": evals("generate_ifeval", "score_ifeval"),
    "eval: {gsm8k: {max_new_tokens: 33}}": evals("generate_gsm8k", "score_gsm8k"),
    "eval: {ifeval: {strip_think: true}}": evals("score_ifeval") | runs("ppo_ifeval", "grpo", "rloo"),  # a reward judges as well
    "data: {slices: {ifeval: {rows: 301}}}": EVERYTHING - {("slice", "sums_eval")},
    "data: {slices: {ifeval: {seed: 2}}}": EVERYTHING - {("slice", "sums_eval")},
    "data: {slices: {sums_eval: {rows: 99}}}": {("slice", "sums_eval")}
    | SLICES
    | ALL_RUNS
    | {("generate_gsm8k", "base"), ("score_gsm8k", "base")},
    "methods: {kto: {train: {beta: 0.27}}}": runs("kto"),
    "methods: {kto: {class_weights: {desirable: 1, undesirable: 2}}}": runs("kto"),
    "methods: {kto: {kl_rows: 8}}": runs("kto"),
    "methods: {rm: {train: {learning_rate: 1.1e-3}}}": RM | runs("ppo", "grpo"),  # whose reward it is
    "methods: {ppo: {train: {num_iterations: 3}}}": runs("ppo", "ppo_ifeval"),
    "methods: {ppo: {ppo: {gamma: 0.99}}}": runs("ppo", "ppo_ifeval"),
    "experiments: {ppo: {ppo: {lam: 0.9}}}": runs("ppo", "ppo_ifeval"),
    "methods: {grpo: {train: {beta: 0.27}}}": runs("grpo", "grpo_numeric"),
    "methods: {rloo: {train: {num_generations: 4}}}": runs("rloo"),
    "experiments: {grpo_numeric: {require_reward_above_chance: false}}": runs("grpo_numeric"),
    "data: {slices: {rm_pairs: {rows: 300}}}": {("slice", "rm_pairs")} | RM | runs("ppo", "grpo"),
    "data: {slices: {instructions: {rows: 300}}}": {("slice", "instructions")} | runs("ppo", "ppo_ifeval", "grpo", "rloo"),
    "data: {slices: {sft: {rows: 2001}}}": {("slice", "sft")} | ALL_RUNS,
    "data: {slices: {sft: {heldout: 51}}}": {("slice", "sft")} | ALL_RUNS,
    "data: {slices: {pairs: {rows: 11}}}": {("slice", "pairs")} | runs(*DPO, "kto"),
    "data: {slices: {pairs: {seed: 2}}}": {("slice", "pairs")} | runs(*DPO, "kto"),
    "data: {max_drop: 0.5}": SLICES | ALL_RUNS,
    "data: {max_prompt_tokens: 91}": SLICES | ALL_RUNS,
    "data: {decontaminate: {rule: ngram}}": SLICES | ALL_RUNS,
    "base: {scratch: {train: {steps: 701}}}": BELOW_BASE,
    "threads: 2": BELOW_BASE,
    "precision: bf16": ALL_RUNS,  # the tiny base is made on the CPU, in fp32
    "device: cuda": ALL_RUNS | EVALS,
    "eval: {shards: 3}": set(),
    "requests: {time: 9.0}": set(),
    "allow_package_mismatch: true": EVERYTHING,
    "seeds: [1, 2, 3]": set(),
    "track: tensorboard": set(),
    "pathvars: {logs: elsewhere}": set(),
    "experiments: {more: {extends: dpo, train: {beta: 0.5}}}": set(),
    "data: {slices: {more: {kind: ifeval, rows: 5, seed: 1, source: {tiny: {split: dev}}}}}": set(),
    "allow_package_mismatch: false": set(),
    # the same value, written in another way
    "methods: {dpo: {train: {weight_decay: 0, num_train_epochs: 1.0}}}": set(),
}


@pytest.mark.parametrize("overlay", EDITS)
def test_an_edit_of_the_config_makes_exactly_these_steps_stale(user, tmp_path, overlay):
    (tmp_path / "overlay.yaml").write_text(overlay)
    assert stale(fingerprints(user), fingerprints(merge(user, read_yaml(tmp_path / "overlay.yaml")))) == EDITS[overlay]


def test_a_seed_is_a_run_of_its_own_from_sft_on_and_leaves_base_and_data_alone(user):
    plan = Plan(Config(user))
    for run in ("sft_v2", "dpo"):
        first, second = plan.step("train", run), plan.step("train", f"{run}.seed2")
        assert (first["seed"], second["seed"]) == (1, 2)
        assert first["parents"]["rows"] == second["parents"]["rows"]
        assert (first["parents"]["start"] == second["parents"]["start"]) == (run == "sft_v2")
    assert plan.step("merge", "sft_v2.seed2")["parents"]["adapter"] == plan.fingerprint("train", "sft_v2.seed2")


def test_the_quantisation_block_is_no_part_of_training_in_full_precision(user):
    user["experiments"]["plain"] = {"method": "dpo", "start_from": "base"}
    other = merge(user, {"quant": {"double": False}})
    before, after = Plan(Config(user)), Plan(Config(other))
    assert before.fingerprint("train", "plain") == after.fingerprint("train", "plain")
    assert before.fingerprint("train", "sft_v1") != after.fingerprint("train", "sft_v1")


def selected(user: dict) -> set[int]:
    """Line numbers of the rows that the local slice takes, worked out here: ten of twenty, drawn by the seed."""
    import random

    return set(random.Random(user["data"]["slices"]["pairs"]["seed"]).sample(range(1, 21), 10))


def test_a_row_inside_the_selection_makes_what_trains_on_it_stale_and_a_row_outside_does_not(user, tmp_path):
    before, path = fingerprints(user), tmp_path / "mine.jsonl"
    lines, taken = path.read_text().splitlines(), selected(user)
    inside, outside = min(taken), min(set(range(1, 21)) - taken)
    for number, expected in ((outside, set()), (inside, PAIRS)):
        changed = list(lines)
        changed[number - 1] = changed[number - 1].replace("good", "better")
        path.write_text("\n".join(changed) + "\n")
        os.utime(path, (1, 1))  # older than what it replaces, and always the same: times decide nothing
        assert stale(before, fingerprints(user)) == expected
    path.write_text("\n".join(lines) + "\n")
    assert fingerprints(user) == before


def test_a_touched_or_moved_source_or_another_line_end_makes_nothing_stale(user, tmp_path):
    before, path = fingerprints(user), tmp_path / "mine.jsonl"
    os.utime(path)
    assert fingerprints(user) == before
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert fingerprints(user) == before
    (tmp_path / "other").mkdir()
    path.rename(tmp_path / "other/mine.jsonl")
    moved = merge(user, {"data": {"slices": {"pairs": {"source": {"path": str(tmp_path / "other/mine.jsonl")}}}}})
    assert fingerprints(moved) == before


def test_the_cache_of_contents_is_used_and_a_broken_one_is_no_harm(user, tmp_path):
    before = fingerprints(user)
    cache = tmp_path / "results/.work/content_cache.json"
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: "another hash"}))
    assert stale(before, fingerprints(user)) == PAIRS
    for broken in ("[1]", "{", ""):
        cache.write_text(broken)
        assert fingerprints(user) == before


def test_a_missing_or_empty_source_names_the_key(user, tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"data.slices.pairs.source.path: .*mine.jsonl: no rows in this file"):
        fingerprints(user)
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(InputError, match=r"data.slices.pairs.source.path: .*mine.jsonl: cannot be read: No such file"):
        fingerprints(user)


def test_a_slice_of_several_files_has_them_as_inputs_and_is_stale_only_by_the_rows_it_takes(user, tmp_path):
    (tmp_path / "more.jsonl").write_text((tmp_path / "mine.jsonl").read_text().replace("question", "query"))
    files = [str(tmp_path / "mine.jsonl"), str(tmp_path / "more.jsonl")]
    user["data"]["slices"]["pairs"] |= {"source": {"paths": files}, "rows": 25}
    plan = Plan(Config(user))
    assert plan.source_files("pairs") == files and plan.source_files("sft") == []
    step = plan.step("slice", "pairs")
    assert step["config"]["source"] == {"files": ["mine.jsonl", "more.jsonl"]}
    before = fingerprints(user)
    lines = (tmp_path / "more.jsonl").read_text().splitlines()
    hits = 0
    for i in range(20):
        changed = list(lines)
        changed[i] = changed[i].replace("good", "better")
        (tmp_path / "more.jsonl").write_text("\n".join(changed) + "\n")
        found = stale(before, fingerprints(user))
        assert found in (set(), PAIRS)
        hits += bool(found)
    import random

    assert hits == sum(index >= 20 for index in random.Random(user["data"]["slices"]["pairs"]["seed"]).sample(range(40), 25))


def test_a_hub_slice_is_planned_without_a_network_by_name_revision_and_split(user):
    source = {"hub": "org/talk", "revision": "0" * 40, "split": "train", "shuffle_buffer": 1000}
    user["data"]["slices"]["pairs"] |= {"source": source, "rows": 5000, "heldout": 9}
    plan = Plan(Config(user))
    step = plan.step("slice", "pairs")
    assert step["external"] == {"hub": "org/talk", "revision": "0" * 40, "split": "train"}
    assert step["config"]["source"] == source and plan.source_files("pairs") == []
    assert "datasets" in step["packages"] and "datasets" not in plan.step("slice", "sft")["packages"]
    before = fingerprints(user)
    other = merge(user, {"data": {"slices": {"pairs": {"source": {"revision": "1" * 40}}}}})
    assert stale(before, fingerprints(other)) == PAIRS
    del source["revision"]
    unpinned = Plan(Config(user | {"allow_unpinned": True})).step("slice", "pairs")
    assert "revision" not in unpinned["config"]["source"] and unpinned["external"]["revision"] is None


def test_a_missing_source_names_its_key_in_the_config(user):
    for source, key in (({"path": "none.jsonl"}, "path"), ({"paths": ["none.jsonl"]}, "paths")):
        user["data"]["slices"]["pairs"]["source"] = source
        with pytest.raises(InputError, match=f"data.slices.pairs.source.{key}: none.jsonl: cannot be read: No such file"):
            Plan(Config(user)).step("slice", "pairs")


def test_who_trains_on_a_slice_asks_for_rows_that_are_whole(tmp_path):
    (tmp_path / "over.yaml").write_text("experiments: {dpo_long: {extends: dpo, train: {max_length: 96}, max_left_out: 0.5}}\n")
    limits = Plan(config.load(ROOT / "config/config.yaml", tmp_path / "over.yaml")).limits()
    assert limits.keys() == {"pairs", "rm_pairs"}
    place = "results/data/pairs.jsonl"
    assert limits["pairs"] == [
        {"max_length": 128, "max_left_out": 0.2, "place": place, "user": "dpo, dpo_4bit, dpo_flipped, dpo_ipo, kto"},
        {"max_length": 96, "max_left_out": 0.5, "place": place, "user": "dpo_long"},
    ]
