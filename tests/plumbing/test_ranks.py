"""Several processes of one job: who starts them sees how they end, and says it in one line. No torch here."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workflow_scripts.plumbing import launch

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import os, signal, sys, time
from pathlib import Path
from workflow_scripts.plumbing import ranks
rank, meet = int(sys.argv[-3]), Path(sys.argv[-1])
ranks.end_with_starter()
ranks.become(rank, 3, meet, "cpu")
Path(f"pid{rank}").write_text(str(os.getpid()))
print("rank", rank, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
"""
STARTER = """
import sys
from pathlib import Path
from workflow_scripts.plumbing import launch
ended = launch.run([sys.executable, "rank.py"], None, 3, Path("logs"), float(sys.argv[1]))
print(ended)
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """ranks(code): how three ranks end that run it, `rank` being theirs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(code: str, patience: float = 60, cards: list[str] | None = None) -> launch.Ended | None:
        Path("rank.py").write_text(RANK + code)
        return launch.run([sys.executable, "rank.py"], cards, 3, Path("logs"), patience)

    return run


def gone(path: Path) -> bool:
    try:
        return "Z" in Path(f"/proc/{path.read_text()}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True


def test_ranks_that_end_well_say_nothing_and_each_sees_its_card(ranks, capfd):
    assert ranks("", cards=["GPU-a", "GPU-b", "GPU-c"]) is None
    assert capfd.readouterr().out == "rank 0 GPU-a\n"
    assert [Path(f"logs/rank{rank}.log").read_text() for rank in (1, 2)] == ["rank 1 GPU-b\n", "rank 2 GPU-c\n"]


def test_a_killed_rank_is_named_and_those_that_lost_it_end_with_it(ranks):
    ended = ranks("""
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 0:
    time.sleep(0.1)
    ranks.note_end("lost", "Connection reset by peer")
    sys.exit(1)
time.sleep(100)  # as NCCL waits
""")
    assert (ended.kind, ended.rank, ended.text) == ("killed", 1, "rank 1 was ended by SIGKILL")
    assert all(gone(Path(f"pid{rank}")) for rank in range(3))


def test_an_error_of_one_rank_is_its_own_and_that_of_all_is_told_once(ranks):
    own = ranks("""
if rank == 2:
    ranks.note_end("error", "ValueError: x")
else:
    ranks.note_end("lost", "gone")
sys.exit(1)
""")
    assert own.text == "rank 2: ValueError: x (details: logs/rank2.log)"
    of_all = ranks("ranks.note_end('input', 'found 3, expected 4')\nsys.exit(1)\n")
    assert (of_all.kind, of_all.rank, of_all.text) == ("input", 0, "found 3, expected 4")


def test_a_rank_that_does_not_come_to_an_exchange_is_named(ranks):
    ended = ranks("""
ranks.come("what to do")
if rank != 2:
    ranks.come("gradients of step 1")
time.sleep(100)
""", patience=2)  # fmt: skip
    assert ended.text == "rank 2 did not come to exchange 2 (gradients of step 1) within 2 s, and all were ended"
    assert all(gone(Path(f"pid{rank}")) for rank in range(3))


def test_who_computes_for_long_while_nobody_waits_is_not_late(ranks):
    assert ranks("ranks.come('a')\ntime.sleep(1.5)\n", patience=0.5) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_to_the_starter_reach_the_ranks(ranks, number, tmp_path):
    Path("rank.py").write_text(
        RANK
        + """
def stop(number, frame):
    ranks.note_end("interrupted", "saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
Path(f"ready{rank}").touch()
time.sleep(100)
"""
    )
    Path("starter.py").write_text(STARTER)
    starter = subprocess.Popen([sys.executable, "starter.py", "60"], stdout=subprocess.PIPE, text=True)
    for _ in range(500):
        if all(Path(f"ready{rank}").exists() for rank in range(3)):
            break
        time.sleep(0.02)
    starter.send_signal(number)
    said, _ = starter.communicate(timeout=30)
    if number == signal.SIGTERM:
        assert "kind='interrupted', rank=0, text='saved'" in said
    for _ in range(250):
        if all(gone(Path(f"pid{rank}")) for rank in range(3)):
            return
        time.sleep(0.02)
    raise AssertionError("a rank lives on")
