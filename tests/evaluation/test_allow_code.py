"""Tasks whose metric runs what the model answers (`allow_code`): the same verdicts, and nothing gets out of the sandbox."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.own_task import ASKED, MEAN, scored, write
from workflow_scripts.evaluation import code_eval, judge_code, own_tasks, sandbox
from workflow_scripts.plumbing.messages import InputError


def possible() -> bool:
    try:
        sandbox.check()
    except InputError:
        return False
    return True


pytestmark = [
    pytest.mark.usefixtures("undescribed"),
    pytest.mark.skipif(not possible(), reason="this kernel gives an ordinary user no namespaces"),
]

METRIC = """
import contextlib, io

def runs(references, predictions, **_):
    said = {}
    try:
        exec(predictions[0], said)
    except Exception:
        return 0.0
    return float(said.get("answer") == int(references[0]))
"""
RUNS = {
    "output_type": "generate_until", "unsafe_code": True, "doc_to_text": "{{question}}", "doc_to_target": "{{wanted}}",
    "generation_kwargs": {"until": ["~"], "max_gen_toks": 8}, "metric_list": [{"metric": "FUNCTION", **MEAN}],
}  # fmt: skip


FIRST = [{"name": "none", "filter": [{"function": "take_first"}]}]


def task(folder: Path, answers: int) -> Path:
    rows = [{"question": f"what is {n}", "wanted": 7} for n in range(answers)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judge.py").write_text(METRIC)
    files = {"data_files": {"test": str(folder / "mine_test.jsonl")}}
    file = write(folder, "generate_until", rows, filter_list=FIRST, fewshot_split="test", dataset_kwargs=files, **RUNS)
    file.write_text(file.read_text().replace("metric: FUNCTION", "metric: !function judge.runs"))
    return file


LIMITS = {"seconds": 4, "memory_gb": 4, "processes": 64}
CONFIG = {"task": "mine", "metric": "runs", "allow_code": LIMITS}


class Said:
    """What `own_tasks.answering` has after `ask`."""

    cut = 0

    def __init__(self, answers: list[str]):
        self.answers = [[{"response": one, "tokens": 3, "truncated": False}] for one in answers]
        self.prompts = ["what is 0"]


def judged(folder: Path, answers: list[str]) -> dict:
    file = task(folder, len(answers))
    return by_files(CONFIG | {"lm_eval": ASKED | {"file": file.name}}, [file], answers)


def by_files(config: dict, files: list[Path], answers: list[str]) -> dict:
    _, tasks = own_tasks.load(config, files, files[0].parent / "cache")
    return judge_code.judge(config, files, tasks, Said(answers), files[0].parent)


OUTSIDE = "{folder}/outside"
ANSWERS = {  # what the model says -> whether it is right, why it was stopped
    "answer = 7": (True, ""),
    "answer = 8": (False, ""),
    "this is no program": (False, ""),
    # each is right if it gets through
    "import socket; socket.create_connection(('127.0.0.1', {port}), 5); answer = 7": (False, ""),
    "import socket; s = socket.socket(socket.AF_UNIX); s.connect('{unix}'); answer = 7": (False, ""),
    f"open('{OUTSIDE}', 'w').write('x'); answer = 7": (False, ""),
    "import os; os.kill({parent}, 0); answer = 7": (False, ""),
    "import os; answer = 7 if 'A_TOKEN' in str(dict(os.environ)) else 0": (False, ""),
    "import os; answer = 7 if os.path.exists('/proc/{parent}/environ') else 0": (False, ""),
    "import os; os.system('unshare -rm mount -o remount,rw /'); open('{folder}/outside', 'w'); answer = 7": (False, ""),
    "open('/proc/1/mem', 'r+b'); answer = 7": (False, ""),
    "open('left', 'w').write('x'); answer = 7": (True, ""),
    "import os; answer = 7 if os.listdir() == [] else 0": (True, ""),  # the next one finds nothing of it
    "open('large', 'wb').write(bytes(100 * 2**20)); answer = 7": (False, ""),
    "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)\nanswer = 7": (True, ""),
    "bytearray(64 * 2**30); answer = 7": (False, ""),
    "import socket; s, _ = socket.socketpair(type=socket.SOCK_DGRAM); s.connect('{datagrams}'); answer = 7": (False, ""),
    "import socket; s, _ = socket.socketpair(type=socket.SOCK_RAW); s.connect('{datagrams}'); answer = 7": (False, ""),
    "import socket; s, t = socket.socketpair(); s.send(b'7'); answer = int(t.recv(1))": (True, ""),  # asyncio wants one
    "import ctypes; answer = 7 - ctypes.CDLL(None).unshare(0x10000000)": (False, ""),  # all capabilities, within
    "import os; answer = 7 if os.getsid(0) == 0 else 0": (False, ""),  # the terminal's session
    "import os; os.write(3, b'no scores'); answer = 7": (False, ""),
    "import os; os.open('/dev/ptmx', os.O_RDWR); answer = 7": (False, ""),
    "open('/dev/null', 'w').write('x'); open('/dev/urandom', 'rb').read(1); answer = 7": (True, ""),
    "import os; os.kill(1, 2); answer = 7": (True, ""),  # and the judge goes on
    "import ctypes; answer = 7 if ctypes.CDLL(None).shmget(77, 4096, 0o1600) >= 0 else 0": (False, ""),  # it would stay
    "open('/dev/shm/left', 'w').write('x'); answer = 7": (True, ""),
    "import os; answer = 7 if os.listdir('/dev/shm') == [] else 0": (True, ""),
    "import os\nfor _ in range(2000):\n    os.mkdir('d' * 99); os.chdir('d' * 99)\nanswer = 7": (True, ""),
    "import os; answer = 7 if os.listdir() == [] else 0 ": (True, ""),
    "import os; os.mkdir('a'); os.mkdir('a/b'); os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0); answer = 7": (True, ""),
    "import os; answer = 7 if os.listdir() == [] else 0  ": (True, ""),
    "exit()": (False, "ended"),
    "import os; os._exit(0)": (False, "ended"),
    "while True: pass": (False, "seconds"),
    "import os\nwhile True: os.fork()": (False, "processes"),
    "import os; os.kill(1, 9); os.kill(os.getpid(), 9)": (False, "ended"),
    "answer = 3 + 4": (True, ""),  # what came before did no harm
}


def test_each_answer_is_judged_and_none_gets_out(tmp_path, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "secret")
    source = Path(sandbox.__file__).read_text()
    server, local = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 107 letters
    local.bind("local")
    local.listen()
    datagrams.bind("datagrams")
    facts = {"folder": tmp_path, "port": server.getsockname()[1], "unix": tmp_path / "local", "parent": os.getpid()}
    facts["datagrams"] = tmp_path / "datagrams"
    answers = [one.format(**facts) if "{" in one else one for one in ANSWERS]
    monkeypatch.setattr(judge_code.subprocess, "run", in_time(judge_code.subprocess.run))
    made = judged(tmp_path, answers)
    assert [one["correct"] for one in made["per_prompt"]] == [right for right, _ in ANSWERS.values()]
    stopped = made["stopped"]  # on a busy machine processes may be slow to come: then time ends them
    assert stopped["ended"] == 3 and stopped["seconds"] + stopped.get("processes", 0) == 2 and sum(stopped.values()) == 5
    assert not (tmp_path / "outside").exists() and Path(sandbox.__file__).read_text() == source
    assert made["runs"] == pytest.approx(sum(right for right, _ in ANSWERS.values()) / len(ANSWERS))
    for one in (server, local):
        one.settimeout(0.01)
        with pytest.raises(TimeoutError):
            one.accept()
        one.close()


def in_time(right, planted=""):
    """The judging process; a fault."""
    code = f"from workflow_scripts.evaluation import sandbox, judge_code\n{planted}\njudge_code.main()"

    def run(command, **how):
        return right([command[0], "-c", code, command[-1]], timeout=300, **how)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "sockets", "a view that is not read-only"])
def test_without_a_part_of_the_sandbox_an_answer_gets_out(fault, tmp_path, monkeypatch):
    """Else the test above could be one that no answer can fail."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as local:
        local.bind("local")
        local.listen()
        answers = [
            f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('{tmp_path}/local'); answer = 7",
            f"open('{tmp_path}/outside', 'w').write('x'); answer = 7",
        ]
        planted = {
            "none": "",
            "sockets": "sandbox._refusing = lambda *_: bytes.fromhex('060000000000ff7f')",  # BPF: allow
            "a view that is not read-only": "sandbox.ATTR_RDONLY = 0",
        }[fault]
        monkeypatch.setattr(judge_code.subprocess, "run", in_time(judge_code.subprocess.run, planted))
        made = judged(tmp_path / "task", answers)
    through = {"none": [False, False], "sockets": [True, False], "a view that is not read-only": [False, True]}[fault]
    assert [one["correct"] for one in made["per_prompt"]] == through and (tmp_path / "outside").exists() == through[1]


def test_a_metric_that_raises_is_one_line(tmp_path):
    file = task(tmp_path, 2)
    (tmp_path / "judge.py").write_text("def runs(references, predictions, **_):\n    return float(references[1])\n")
    with pytest.raises(InputError, match="^eval.tasks.mine: IndexError: list index out of range$"):
        by_files(CONFIG | {"lm_eval": ASKED | {"file": file.name}}, [file], ["a", "b"])


PROGRAMS = ("return a + b", "return a * b", "while True: pass", "exit()", "import os; os._exit(0)")


def test_no_program_runs_where_a_container_has_us_as_its_first_process(monkeypatch):
    """Some tasks try `code_eval` when they are imported, outside the sandbox."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    found, passed = code_eval.CodeEval().compute([["pass"]], [""], k=1)
    assert found == {"pass@1": 0.0} and passed == {0: [False]}


@pytest.mark.slow
def test_human_eval_from_local_rows(tmp_path):
    rows = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": "def add(a, b):\n",
            "test": "def check(f):\n    assert f(2, 3) == 5\n    assert f(0, 1) == 1\n",
            "entry_point": "add",
            "canonical_solution": "    return a + b\n",
        }
        for n in range(len(PROGRAMS))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"task": "mine", "metric": "pass@1", "allow_code": LIMITS}
    config |= {"lm_eval": ASKED | {"task": "humaneval", "data_files": {"test": file.name}}}
    made = by_files(config, [file], [f"    {one}" for one in PROGRAMS])
    assert [one["correct"] for one in made["per_prompt"]] == [True, False, False, False, False]
    assert made["pass@1"] == 0.2 and made["stopped"] == {}


@pytest.mark.slow
def test_mbpp_from_local_rows(tmp_path):
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"]
    row = {"task_id": 1, "text": "Add.", "code": "def add(a, b): return a + b", "test_list": tests}
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(row)}\n" * 3)
    config = {"task": "mine", "metric": "pass_at_1", "allow_code": LIMITS}
    config |= {"lm_eval": ASKED | {"task": "mbpp", "num_fewshot": 3, "data_files": {"test": file.name}}}
    right = "def add(a, b): return a + b\n"
    made = by_files(config, [file], [right, right.replace("+", "*"), f"```python\n{right}```"])
    assert [one["correct"] for one in made["per_prompt"]] == [True, False, False]  # as lm-eval reads them: a fence is no Python


@pytest.mark.slow
def test_the_step_asks_here_and_judges_there(speaking_base, tmp_path):
    """A tiny model's answers are no programs: a metric that says how long they are, by code of theirs."""
    file = task(tmp_path / "task", 5)
    lines = ("said = {}", "exec(f'n = {len(predictions[0])} % 2', said)", "return said['n']")
    judge = "".join(f"    {line}\n" for line in lines)
    (tmp_path / "task/judge.py").write_text(f"def runs(references, predictions, **_):\n{judge}")
    made = scored(tmp_path, "generate_until", speaking_base, file, "runs", more={"allow_code": LIMITS})
    answers = [one["response"] for one in made["per_prompt"]]
    assert [one["correct"] for one in made["per_prompt"]] == [len(one) % 2 == 1 for one in answers] and any(answers)
    assert made["example"]["prompt"] == "what is 0" and made["stopped"] == {}
    drawn = {"allow_code": LIMITS, "drawn": {"samples": 3, "temperature": 1.0, "seed": 1, "top_k": 0, "top_p": 1.0}}
    several = scored(tmp_path / "several", "generate_until", speaking_base, file, "runs", more=drawn)
    for one in several["per_prompt"]:
        assert one["correct"] == [len(text) % 2 == 1 for text in one["response"]]
    share = sum(map(sum, (one["correct"] for one in several["per_prompt"]))) / 15
    assert several["pass_at"]["1"]["share"] == pytest.approx(share) == several["runs"]


@pytest.mark.skipif(not shutil.which("unshare"), reason="util-linux is not here")
def test_a_kernel_that_gives_no_namespaces_is_one_line():
    code = "from workflow_scripts.evaluation import sandbox; sandbox.check()"
    shell = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["unshare", "-r", "sh", "-c", shell], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "allow_code: there is no sandbox for the model's code on this machine: it needs namespaces of its own" in last
