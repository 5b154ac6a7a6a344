"""`gpus: 2` through the real rule, as a user types it: two processes train, and what they made is what one would have made."""

import json

import pytest

pytestmark = pytest.mark.slow
ACCUMULATED = "methods: {sft: {%s train: {per_device_train_batch_size: 4, gradient_accumulation_steps: 4}}}\n"


def test_a_training_by_two_processes_is_not_stale_for_one(fresh):
    two, target = fresh.overlay(ACCUMULATED % "gpus: 2,"), "results/sft_v2/adapter/manifest.json"
    fresh.snakemake(target, "--cores", "2", configs=two)
    info = json.loads((fresh.folder / "results/sft_v2/adapter/run.json").read_text())
    assert info["gpus"] == 2 and "gpus" not in json.dumps(json.loads((fresh.folder / target).read_text())["step"])
    log = (fresh.folder / "logs/sft_v2/train.log").read_text()
    assert "sft_v2: 1/" in log
    one = fresh.overlay(ACCUMULATED % "")
    assert fresh.plan(target, configs=one) == {}
