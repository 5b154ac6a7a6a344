"""Models from a hub: taken at their revision, and one clear error, before any job, where there is no hub."""

import shutil
import time

import pytest

from tests.models.test_sources import COMMIT, STORIES, make, plan, user_config
from tests.support import cpu
from workflow_scripts.config import config
from workflow_scripts.data import hub
from workflow_scripts.models import sources
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub that holds one model at one commit; what was asked of it."""
    import huggingface_hub

    folder, asked = tmp_path / f"cache/{COMMIT}", []
    shutil.copytree(STORIES, folder)

    def download(name, revision=None, **options):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_model_of_a_hub_is_taken_at_its_revision(tmp_path, fake_hub):
    made = make(tmp_path, plan(tmp_path, source="hub", hub={"id": "org/stories", "revision": COMMIT}))
    assert fake_hub == [("org/stories", COMMIT)]
    assert made.data["revision"] == COMMIT and made.data["pinned"] is True and made.data["parameters"] == 656000
    with pytest.raises(InputError, match=f"asked for org/stories at revision {'f' * 40}, the hub gave {COMMIT}"):
        sources.from_hub("org/stories", "f" * 40)


def test_an_unpinned_model_is_taken_on_request_and_says_so(tmp_path, fake_hub):
    user = user_config(tmp_path, source="hub", hub={"id": "org/stories"}) | {"allow_unpinned": True}
    planned = Plan(config.Config(user))
    assert planned.step("base", "base")["allow_unpinned"] is True
    made = make(tmp_path, planned)
    assert made.data["pinned"] is False and made.data["revision"] == COMMIT and made.data["step"]["allow_unpinned"] is True


def hub_step(revision: str | None = COMMIT) -> dict:
    return {"step": "make_base", "config": {"source": "hub", "hub": {"id": "org/model", "revision": revision}}}


def test_without_a_hub_one_error_names_model_revision_and_three_remedies(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        hub.check([{"step": "merge", "config": {}}, hub_step()])
    for part in ("org/model", COMMIT, "source: path", "HF_HOME", "HF_ENDPOINT", "unset HF_HUB_OFFLINE"):
        assert part in str(error.value)
    (tmp_path / f"models--org--model/snapshots/{COMMIT}").mkdir(parents=True)
    (tmp_path / f"models--org--model/snapshots/{COMMIT}/config.json").write_text("{}")
    hub.check([hub_step()])  # in the cache: no hub is needed


def test_a_hub_that_does_not_answer_is_found_out_in_seconds(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InputError, match=r"no answer from http://127.0.0.1:9"):
        hub.check([hub_step()])
    assert time.monotonic() - started < 60  # asked once, without the hub's library and its retries: at once
    hub.check([{"step": "merge", "config": {"quantise": "nf4"}}])  # nothing of a hub: nothing is asked


def test_only_a_step_with_a_hub_source_may_go_online():
    assert cli._needs_hub({"config": {"source": "hub"}})
    assert cli._needs_hub({"config": {"source": {"hub": "org/data", "split": "train"}}})
    for source in ("path", {"path": "x"}, {"tiny": {}}):
        assert not cli._needs_hub({"config": {"source": source}})
    assert not cli._needs_hub({"config": {}})


def test_a_run_without_a_hub_stops_before_its_first_job_and_a_dry_run_plans(fresh, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(fresh.folder / "empty"))
    base = f"source: hub, dtype: bf16, hub: {{id: org/model, revision: {COMMIT}}}"
    configs = fresh.overlay(f"base: {{{base}}}")
    assert fresh.plan("results/ifeval_dpo.json", configs=configs)["make_base"] == 1
    before = cpu.seconds()
    done = fresh.snakemake("results/ifeval_dpo.json", configs=configs, check=False)
    assert cpu.seconds() - before < 10
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(COMMIT) == 1 and "HF_ENDPOINT" in done.stderr
    assert not (fresh.folder / "results/data").exists() and not list((fresh.folder / ".snakemake/locks").glob("*"))
