"""`gpus: 2` and `shard: true` through the real rule, as a user types it: two processes make what one would have made."""

import json

import pytest

pytestmark = pytest.mark.slow
ACCUMULATED = "methods: {sft: {%s quantise: none, train: {per_device_train_batch_size: 4, gradient_accumulation_steps: 4}}}\n"


def test_gpus_of_several_nodes_are_asked_for_by_node(fresh):
    over = "device: cuda\nmethods: {sft: {gpus: 4, nodes: 2, train: {gradient_accumulation_steps: 4}}}\n"
    planned = fresh.snakemake("-n", "results/sft_v2/adapter/manifest.json", configs=fresh.overlay(over))
    found = (planned.stdout + planned.stderr).split("rule train_sft_nodes:")[1].split("resources:")[1].split("\n")[0]
    assert all(one in found for one in ("mpi=srun", "nodes=2", "tasks_per_node=2", "gres=gpu:2", "gpu=0", "ranks=4")), found


def test_a_training_by_two_processes_is_not_stale_for_one(fresh):
    two, target = fresh.overlay(ACCUMULATED % "gpus: 2, shard: true,"), "results/sft_v2/adapter/manifest.json"
    fresh.snakemake(target, "--cores", "2", configs=two)
    info = json.loads((fresh.folder / "results/sft_v2/adapter/run.json").read_text())
    assert (info["gpus"], info["shard"]) == (2, True)
    step = json.dumps(json.loads((fresh.folder / target).read_text())["step"])
    assert '"gpus"' not in step and '"shard"' not in step
    log = (fresh.folder / "logs/sft_v2/train.log").read_text()
    assert "sft_v2: 1/" in log
    one = fresh.overlay(ACCUMULATED % "")
    assert fresh.plan(target, configs=one) == {}
