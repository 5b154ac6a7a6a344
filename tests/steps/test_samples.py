"""`samples` of a task: the answers' streams are their own, whoever answers and however often it was killed; and the config."""

import json
import shutil

import pytest

from tests.conftest import ROOT
from tests.support import small_steps
from tests.support.own_task import ASKED, scored, write
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.jsonl import read_jsonl
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import generate
from workflow_scripts.tools.differences import differences

ROWS = {split: str(ROOT / f"data/gsm8k/{split}.jsonl") for split in ("train", "test")}
DRAWN = {"samples": 3, "temperature": 0.8, "seed": 1, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    prompts = small_steps.instructions_slice(folder / "data", 11, "prompts")
    return folder, {"start": small_steps.copy_tiny_base(folder / "base"), "prompts": prompts}


def job_of(world, name: str, batch: int = 0, **drawn) -> manifests.Job:
    folder, parents = world
    config = small_steps.answering(10, batch, drawn=DRAWN | drawn)
    job = small_steps.job("generate", folder / name / "x_responses.manifest.json", parents, config)
    job.step["out"] = "one step, wherever it goes"
    return job


def rows_of(job: manifests.Job) -> list[dict]:
    return read_jsonl(job.out.with_name("x_responses.jsonl"))


def made(world, name: str, batch: int = 0, **drawn) -> list[dict]:
    job = job_of(world, name, batch, **drawn)
    generate.main(job)
    return rows_of(job)


@pytest.fixture(scope="module")
def alone(world):
    return made(world, "alone")


def test_each_prompt_has_as_many_answers_as_it_asks_for_and_they_differ(world, alone):
    assert [(row["key"], row["sample"]) for row in alone] == [
        (row["key"], n) for row in read_jsonl(world[0] / "data/prompts.jsonl") for n in range(3)
    ]
    texts = [[row["response"] for row in alone[first : first + 3]] for first in range(0, 33, 3)]
    assert sum(len(set(each)) > 1 for each in texts) > 8, "drawn at 0.8, most differ"
    assert made(world, "again") == alone
    assert [row["response"] for row in made(world, "seeded", seed=2)] != [row["response"] for row in alone]


def test_an_answers_draws_do_not_depend_on_how_many_there_are_or_on_who_answers(world, alone):
    more = made(world, "more", samples=4)
    assert [row for row in more if row["sample"] < 3] == alone
    assert made(world, "hf", batch=4) == alone  # transformers' generate, in fp32, from the same streams


def test_shards_and_a_kill_give_the_same_answers(world, alone, monkeypatch, capsys):
    shards = []
    for number in (1, 2):
        job = job_of(world, "run")
        job.step["shard"] = [number, 2]
        job.out = job.out.parent / "x_shards" / f"{number}of2.json"
        generate.main(job)
        shards.append(job.out)
    job = job_of(world, "together")
    job.inputs += shards
    generate.main(job)
    assert rows_of(job) == alone

    class Killed(Exception):
        pass

    job = job_of(world, "killed")
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "complete", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            generate.main(job)
    (saved,) = job.work.glob("*/answers.jsonl")
    lines = saved.read_text().splitlines(keepends=True)
    assert len(lines) == 33 and "sample" in json.loads(lines[0])
    saved.write_text("".join(lines[:20]) + lines[20][:15])
    generate.main(job)
    assert rows_of(job) == alone
    assert "prompts were answered before: taken over" in capsys.readouterr().out
    shutil.rmtree(job.work)


def test_a_task_of_lm_eval_judges_each_answer_as_if_it_were_the_only_one(world, tmp_path):
    """The second answer to each item is declared the right one."""
    base, settings = world[1]["start"], {"until": ["~"], "max_gen_toks": 2}
    file = write(tmp_path / "task", "generate_until", generation_kwargs=settings)
    first = scored(tmp_path / "a", "generate_until", base, file, "exact_match,whole", more={"drawn": DRAWN})
    assert first["exact_match"] == 0 and first["pass_at"]["3"]["share"] == 0
    asked = read_jsonl(tmp_path / "task/mine_test.jsonl")
    said = [entry["response"] for entry in first["per_prompt"]]
    rows = [row | {"options": [answers[1]] * 3} for row, answers in zip(asked, said, strict=True)]
    file = write(tmp_path / "task", "generate_until", rows, generation_kwargs=settings)
    found = scored(tmp_path / "b", "generate_until", base, file, "exact_match,whole", more={"drawn": DRAWN})
    assert [entry["response"] for entry in found["per_prompt"]] == said
    assert [entry["correct"] for entry in found["per_prompt"]] == [[one == answers[1] for one in answers] for answers in said]
    values = [entry["value"] for entry in found["per_prompt"]]
    assert found["exact_match"] == pytest.approx(sum(values) / 18) and 1 / 3 < found["exact_match"] < 1
    assert found["samples"] == 3 and found["pass_at"]["3"]["share"] == 1 > found["pass_at"]["1"]["share"]


# -- the config ---------------------------------------------------------------------------------------------------------------


def config_with(**evaluation) -> Config:
    return Config(merge(load("config/config.yaml").data, {"eval": evaluation}))


def test_samples_stand_in_the_answers_step_alone_and_where_there_are_none_nothing_does():
    plain, drawn = (Plan(config_with(gsm8k=more)) for more in ({}, {"samples": 8, "temperature": 0.7}))
    assert "drawn" not in plain.generate("gsm8k", "dpo")
    step = json.loads(drawn.generate("gsm8k", "dpo"))
    assert step["config"].pop("drawn") == {"samples": 8, "temperature": 0.7, "seed": 1, "top_k": 0, "top_p": 1}
    assert step == json.loads(plain.generate("gsm8k", "dpo"))
    assert drawn.generate("ifeval", "dpo") == plain.generate("ifeval", "dpo")
    other = Plan(config_with(gsm8k={"samples": 8, "temperature": 0.7}, drawn={"seed": 2}))
    assert other.generate("ifeval", "dpo") == plain.generate("ifeval", "dpo")


def test_make_why_names_the_keys_where_they_stand():
    task = {"lm_eval": ASKED | {"task": "gsm8k", "data_files": ROWS}, "metric": "exact_match,strict-match"}
    more = {"samples": 8, "temperature": 0.7}
    plain, drawn, other = (
        config_with(gsm8k=block, tasks={"own": task | block}, drawn=rest)
        for block, rest in (({}, {}), (more, {}), (more | {"temperature": 0.9}, {"seed": 5}))
    )
    steps = [{kind: Plan(one).step(kind, "dpo") for kind in ("generate_gsm8k", "score_own")} for one in (plain, drawn, other)]
    for kind, key in (("generate_gsm8k", "eval.gsm8k"), ("score_own", "eval.tasks.own")):
        first = differences(drawn, kind, "dpo", steps[0][kind], steps[1][kind])
        assert first[0].startswith(f"{key}.samples: ") and len(first) == 1
        assert differences(other, kind, "dpo", steps[1][kind], steps[2][kind]) == [
            "eval.drawn.seed: 1 -> 5",
            f"{key}.temperature: 0.7 -> 0.9",
        ]


def test_through_snakemake_what_is_drawn_is_one_evaluation_and_a_second_run_a_no_op(clone):
    target, overlay = "results/gsm8k_dpo.json", "eval: {{gsm8k: {{samples: 3, temperature: {}}}}}\n"
    clone.snakemake(target)
    before = {path: path.read_bytes() for path in (clone.folder / "results").glob("*_dpo.json")}
    assert clone.folder / target in before and clone.plan(target) == {}
    drawn = clone.overlay(overlay.format(0.8))
    assert clone.plan(target, configs=drawn) == {"generate": 1, "score": 1}
    clone.snakemake(target, configs=drawn)
    scores = json.loads((clone.folder / target).read_text())
    assert scores["samples"] == 3 and list(scores["pass_at"]) == ["1", "2", "3"]
    assert clone.plan(target, configs=drawn) == {} and clone.plan("results/ifeval_dpo.json", configs=drawn) == {}
    assert clone.plan(target, configs=clone.overlay(overlay.format(0.9))) == {"generate": 1, "score": 1}
    clone.snakemake(target)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"gsm8k": {"samples": 8}}, "eval.gsm8k.temperature: missing"),
        ({"ifeval": {"temperature": 0.7}}, "eval.ifeval.samples: missing"),
        ({"ifeval": {"samples": 1, "temperature": 0.7}}, "eval.ifeval.samples: found 1, expected an integer at least 2"),
        ({"ifeval": {"samples": 2, "temperature": 0}}, "eval.ifeval.temperature: found 0, expected a number above 0"),
        ({"tasks": {"arc": {"samples": 2, "temperature": 1.0, "metric": "acc", "lm_eval": {
            "task": "arc_easy", "revision": "a" * 40, "num_fewshot": 0, "chat_template": False, "fewshot_as_multiturn": False,
            "system": None, "limit": None}}}}, "eval.tasks.arc.samples: found 2, and a task of multiple_choice has no answers"),
    ],
)  # fmt: skip
def test_what_can_not_be_drawn_is_one_line(evaluation, said):
    with pytest.raises(InputError, match=said):
        config_with(**evaluation)
