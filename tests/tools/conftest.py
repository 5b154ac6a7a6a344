import os
import shutil
from pathlib import Path

import pytest

from tests.support import small_steps
from workflow_scripts.tiny import world


def train_chain(home: Path, speaking_base: Path) -> None:
    """results/: base, sft_v2 (adapter, merged) and dpo (adapter, answers, score), made by the real steps."""
    home.mkdir()
    before = os.getcwd()
    os.chdir(home)  # manifests name their parents by paths from here
    try:
        results = Path("results")
        base = Path(shutil.copytree(speaking_base.parent, results / "base")) / "manifest.json"
        sft = small_steps.train(results / "sft_v2", "sft_v2", base, small_steps.sft_slice(results / "data"))
        merged = small_steps.merge(results / "sft_v2", base, sft.path)
        dpo = small_steps.train(results / "dpo", "dpo", merged.path, small_steps.pairs_slice(results / "data"))
        prompts = small_steps.write_slice(results / "data", "ifeval", world.eval_rows(6, seed=1), heldout=0)
        small_steps.run(
            small_steps.job(
                "generate", results / "dpo" / "ifeval_responses.manifest.json",
                {"start": merged.path, "adapter": dpo.path, "prompts": prompts}, 
                small_steps.answering(12),
            )
        )  # fmt: skip
        responses = results / "dpo" / "ifeval_responses.manifest.json"
        scored = small_steps.job("score_ifeval", results / "ifeval_dpo.json", {"prompts": prompts, "responses": responses}, {})
        scored.step["config"] = {"strip_think": False}
        from workflow_scripts.steps import score_ifeval

        score_ifeval.main_step(scored)
    finally:
        os.chdir(before)
    for left in home.rglob(".work"):
        shutil.rmtree(left)


@pytest.fixture(scope="session")
def trained(shared, speaking_base) -> Path:
    """A folder with such results. Do not change it: take `home`."""
    return shared.folder("trained", lambda home: train_chain(home, speaking_base))


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of it to change, as the current folder."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def read_only(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained
