"""`eval.shards`: several jobs share the answering of a task's prompts, and the answers are those of one job, byte for byte."""

import json
import shutil

import pytest

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.plan import estimate
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import generate

FILES = ("dpo/ifeval_responses.manifest.json", "dpo/ifeval_responses.jsonl", "ifeval_dpo.json")
BATCHES = "generation: {{backend: hf}}\neval: {{batch_size: 5, shards: {}}}\n"  # 24 prompts: four batches of 5, one of 4


def made(clone, shards: int) -> dict[str, bytes]:
    """The answers and scores of dpo, made anew with so many shards."""
    shutil.rmtree(clone.folder / "results/.work")
    for name in FILES:
        (clone.folder / "results" / name).unlink(missing_ok=True)
    clone.snakemake("results/ifeval_dpo.json", configs=clone.overlay(BATCHES.format(shards)))
    return {name: (clone.folder / "results" / name).read_bytes() for name in FILES}


def test_four_shards_give_the_bytes_of_one(clone):
    alone = made(clone, 1)
    assert clone.plan("results/ifeval_dpo.json", configs=clone.overlay(BATCHES.format(4))) == {}  # how many decides nothing
    (clone.folder / "results/dpo/ifeval_responses.jsonl").unlink()
    planned = clone.plan("results/dpo/ifeval_responses.jsonl", configs=clone.overlay(BATCHES.format(4)))
    assert planned == {"generate_shard": 4, "gather": 1}
    assert made(clone, 4) == alone
    logs = sorted(path.name for path in (clone.folder / "logs/dpo").glob("generate_ifeval_*of4.log"))
    assert logs == [f"generate_ifeval_{n}of4.log" for n in (1, 2, 3, 4)]
    assert not list((clone.folder / "results/dpo").glob("ifeval_shards/*"))  # what is put together is not kept twice
    for shards in (4, 2, 1):
        assert clone.plan("results/ifeval_dpo.json", configs=clone.overlay(BATCHES.format(shards))) == {}


# -- the step, by hand --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    prompts = small_steps.instructions_slice(folder / "data", 11, "prompts")
    return folder, {"start": small_steps.write_base(folder / "base"), "prompts": prompts}


def job_of(world, name: str) -> manifests.Job:
    folder, parents = world
    config = small_steps.answering(4, 2)
    job = small_steps.job("generate", folder / name / "x_responses.manifest.json", parents, config)
    job.step["out"] = "one step, wherever it goes"
    return job


def shard_of(world, number: int, count: int) -> manifests.Artifact:
    job = job_of(world, "run")
    job.step["shard"] = [number, count]
    job.out = job.out.parent / "x_shards" / f"{number}of{count}.json"
    generate.main(job)
    return manifests.read(job.out)


def test_shards_share_whole_batches_and_each_prompt_is_answered_once(world):
    shards = [shard_of(world, n, 4).data["answers"] for n in (1, 2, 3, 4)]
    assert sorted(len(shard) for shard in shards) == [2, 2, 3, 4]  # six batches, the last of one prompt: two shards have two
    assert sorted(int(i) for shard in shards for i in shard) == list(range(11))


def gathered(world, shards: list[manifests.Artifact], name: str) -> manifests.Artifact:
    job = job_of(world, name)
    job.inputs += [shard.path for shard in shards]
    generate.main(job)
    return manifests.read(job.out)


def test_gathered_answers_are_those_of_the_step_that_answers_alone(world):
    alone = job_of(world, "alone")
    generate.main(alone)
    together = gathered(world, [shard_of(world, n, 3) for n in (1, 2, 3)], "together")
    assert alone.out.read_bytes() == together.path.read_bytes()
    assert together.file("x_responses.jsonl").read_bytes() == alone.out.with_name("x_responses.jsonl").read_bytes()


def test_a_shard_of_other_answers_and_a_missing_one_are_refused(world):
    shards = [shard_of(world, n, 3) for n in (1, 2, 3)]
    with pytest.raises(InputError, match=r"3 of 11 answers are not in .*x_shards") as _:
        gathered(world, shards[1:] if len(shards[0].data["answers"]) == 3 else shards[:2], "missing")
    other = json.loads(shards[0].path.read_text())
    other["step"]["config"]["max_new_tokens"] = 5
    other["fingerprint"] = fingerprint(other["step"])
    shards[0].path.write_text(json.dumps(other))
    with pytest.raises(InputError, match="1of3.json: a shard of other answers than"):
        gathered(world, [manifests.read(shard.path) for shard in shards], "foreign")


# -- the plan -----------------------------------------------------------------------------------------------------------------


def plan(backend: str = "hf", **evaluation) -> Plan:
    data = load("config/config.yaml").data
    return Plan(Config(merge(data, {"eval": evaluation, "generation": {"backend": backend}})))


def test_a_task_with_fewer_batches_has_fewer_shards_and_too_many_for_all_are_refused():
    made = plan(shards=4)  # 400 and 200 prompts in batches of 100
    made.check()
    assert (made.shards("ifeval"), made.shards("gsm8k")) == (4, 2)
    assert made.shard_files("gsm8k", "dpo.seed2") == [f"results/dpo.seed2/gsm8k_shards/{n}of2.json" for n in (1, 2)]
    assert plan().shard_files("ifeval", "dpo") == []
    with pytest.raises(InputError, match=r"eval.shards: found 5, but there are 4 batches at most; lower it, or eval.batch_size"):
        plan(shards=5).check()
    assert plan("graphs", shards=5).shards("gsm8k") == 5  # each prompt by itself
    with pytest.raises(InputError, match=r"eval.shards: found 401, but there are 400 prompts at most; lower it$"):
        plan("graphs", shards=401).check()


def test_shards_decide_no_fingerprint_and_shorten_a_job():
    one, four = plan(), plan(shards=4)
    for kind in ("generate_ifeval", "score_ifeval"):
        assert one.fingerprint(kind, "dpo") == four.fingerprint(kind, "dpo")
    texts = {four.shard("ifeval", "dpo", n) for n in (1, 2, 3, 4)}
    assert len(texts) == 4 and four.generate("ifeval", "dpo") not in texts
    seconds = [estimate.Estimates(made).of("generate_ifeval", "dpo")["seconds"] for made in (one, four)]
    assert seconds[1] < seconds[0]
