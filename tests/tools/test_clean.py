"""`make clean-checkpoints`: what no step will go on from is removed, and nothing else."""

import fcntl
from pathlib import Path

import pytest

from workflow_scripts.artifacts import work
from workflow_scripts.config import config
from workflow_scripts.plan.plan import Plan
from workflow_scripts.tools import clean

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    made = Plan(config.load(ROOT / "config/config.yaml"))
    made.check()
    monkeypatch.chdir(tmp_path)
    return made


def leave(plan, fingerprint: str, out: str | None) -> Path:
    """A working folder with a checkpoint of ten thousand bytes."""
    folder = Path(plan.work) / fingerprint
    (folder / "trainer/checkpoint-3").mkdir(parents=True)
    (folder / "trainer/checkpoint-3/optimizer.pt").write_bytes(bytes(10_000))
    if out is not None:
        work.claim(Path(plan.work), fingerprint, Path(out), {"seed": 1})
    return folder


def test_only_what_nothing_goes_on_from_is_removed(plan, capsys, monkeypatch):
    kept = leave(plan, plan.fingerprint("train", "dpo"), "results/dpo/adapter/manifest.json")
    seeded = leave(plan, plan.fingerprint("train", "dpo.seed3"), "results/dpo.seed3/adapter/manifest.json")
    answers = leave(plan, plan.fingerprint("generate_gsm8k", "kto"), "results/kto/gsm8k_responses.manifest.json")
    older = leave(plan, "a" * 32, "results/dpo/adapter/manifest.json")
    unknown = leave(plan, "b" * 32, None)
    foreign = leave(plan, "c" * 32, "results/mine/adapter/manifest.json")
    busy = leave(plan, "d" * 32, "results/sft_v2/adapter/manifest.json")
    (Path(plan.work) / "locks").mkdir()
    with open(Path(plan.work) / "locks" / f"{busy.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for everything, more in ((False, set()), (True, {foreign})):
            found = clean.examine(plan, everything)
            assert {left.folder for left in found if left.goes} == {older, unknown} | more
        for option in (["--dry-run"], []):
            monkeypatch.setattr("sys.argv", ["clean", "--configfile", str(ROOT / "config/config.yaml"), *option])
            clean.main()
            printed = capsys.readouterr().out
            assert f"{'would free' if option else 'freed'} 20." in printed  # kB, of seven folders
            assert older.exists() == unknown.exists() == bool(option)
    assert all(folder.exists() for folder in (kept, seeded, answers, foreign, busy))
    assert "results/sft_v2/adapter/manifest.json (dddddddddddd): at work" in printed
