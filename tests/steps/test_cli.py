"""The command line of a step: what it takes, what it says and where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy_step import Toys, step_of
from workflow_scripts.artifacts import runinfo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def step(tmp_path):
    return step_of(tmp_path)


@pytest.fixture
def run(tmp_path):
    return Toys(tmp_path).run


def test_a_step_is_taken_as_json_or_from_a_file_or_from_its_manifest(tmp_path, step, run):
    assert run(step).returncode == 0
    manifest = tmp_path / "out/manifest.json"
    (tmp_path / "step.json").write_text(json.dumps(step))
    for text in ("step.json", "out/manifest.json", "  " + json.dumps(step, indent=1)):
        assert run(text, out=f"{len(text)}/manifest.json").returncode == 0
        assert (tmp_path / f"{len(text)}/manifest.json").read_bytes() == manifest.read_bytes()
    assert json.loads(manifest.read_text())["step"] == step  # the command line changes nothing of it
    assert (tmp_path / "ran").read_text() == "ran\n"  # the finished copy serves the others


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "--step nonsense: neither JSON nor a file that can be read: No such file"),
        (".", "--step .: neither JSON nor a file that can be read: Is a directory"),
        ("binary", "--step binary: neither JSON nor a file that can be read: 'utf-8' codec"),
        ("x" * 5000, "File name too long"),
        ("{broken", "--step: not JSON: "),
        ("broken.json", "--step broken.json: not JSON: "),
        (
            "{}",
            "--step: found a mapping without config, packages, parents, step, expected the JSON of a step, or a manifest.json",
        ),
        ("list.json", "--step list.json: found a list, expected the JSON of a step"),
        ('{"step": {"config": {}}}', "found a mapping without packages, parents, step"),
    ],
)
def test_what_is_no_step_is_one_line(tmp_path, run, text, words):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    done = run(text)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("out/manifest.json: error: ") and words in done.stderr


def test_an_input_error_is_one_line_on_stderr_and_stands_in_the_log(tmp_path, run):
    step = step_of(tmp_path, wrong=True)
    line = "error: rows.jsonl: line 3: found x, expected y; write y"
    done = run(step)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.strip().endswith(line) and done.stderr.count("\n") == 1
    done = run(step, "--log", "logs/deep/step.log")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"out/manifest.json: {line}\n")
    log = (tmp_path / "logs/deep/step.log").read_text()
    assert "rows.jsonl: line 3: found x," in log and "Traceback" not in log
    assert not (tmp_path / "out").exists()


def test_an_error_of_ours_leaves_its_traceback_in_the_log_and_one_line_on_stderr(tmp_path, run):
    done = run(step_of(tmp_path, crash=True), "--log", "step.log")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "out/manifest.json: error: ValueError: boom at two lines (details: step.log)\n"
    assert "Traceback" in (tmp_path / "step.log").read_text() and "boom" in (tmp_path / "step.log").read_text()


def test_a_description_that_fails_is_said_and_fails_no_step(tmp_path, run):
    """A model card did, where a statistic had no value: the adapter was removed, and trained again with each try."""
    done = run(step_of(tmp_path, text="hard to describe"))
    assert done.returncode == 0 and (tmp_path / "out/manifest.json").is_file()
    assert done.stderr.startswith("out/manifest.json: made, but not described: TypeError: unsupported format string")


def test_the_log_holds_what_a_step_prints_and_the_terminal_stays_quiet(tmp_path, step, run):
    done = run(step, "--log", "step.log")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "step.log").read_text() == "some output\n"


def test_nothing_in_the_shell_decides_what_the_config_says(tmp_path, run, monkeypatch):
    """By ACCELERATE_MIXED_PRECISION transformers trains in bf16 where the step says fp32."""
    names = ["ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "NVIDIA_TF32_OVERRIDE"]
    for name in names:
        monkeypatch.setenv(name, "bf16")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    shown = [*names, "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS"]
    done = run(step_of(tmp_path, shows=shown), "--log", "log")
    assert done.returncode == 0
    log = (tmp_path / "log").read_text()
    assert str(dict.fromkeys(names) | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}) in log
    assert "not heeded, since the config decides: ACCELERATE_MIXED_PRECISION, NVIDIA_TF32_OVERRIDE, WORLD_SIZE" in log


def test_another_version_than_the_locked_one_stops_the_step_unless_it_is_allowed_and_then_is_recorded(tmp_path, run, step):
    have = runinfo.installed(["pytest", "pyyaml"])
    step["packages"] = {"pytest": "0.1", "pyyaml": have["pyyaml"], "no-such-library": "1.0"}
    done = run(step)
    assert done.returncode == 1 and not (tmp_path / "ran").exists()
    assert f"pytest: {have['pytest']} is installed, the lock file says 0.1 (and 1 more); run `make setup`, or set" in done.stderr
    assert run(step | {"allow_package_mismatch": True}).returncode == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["package_mismatch"] == {
        "pytest": {"locked": "0.1", "installed": have["pytest"]},
        "no-such-library": {"locked": "1.0", "installed": "not installed"},
    }
    step["packages"] = {"pyyaml": have["pyyaml"], "python": "2.7"}
    assert "python: 3." in run(step).stderr


def test_local_tags_of_installed_versions_do_not_count(monkeypatch):
    monkeypatch.setattr(runinfo.metadata, "version", lambda name: "2.13.0+cpu")
    assert runinfo.check_packages({"packages": {"torch": "2.13.0"}}) == {}
    assert runinfo.check_packages({"packages": {"torch": "2.13.1"}, "allow_package_mismatch": True}) == {
        "torch": {"locked": "2.13.1", "installed": "2.13.0"}
    }


def test_a_parent_of_another_fingerprint_stops_the_step_by_name(tmp_path, run, step):
    assert run(step).returncode == 0
    child = step_of(tmp_path) | {"parents": {"start": "0" * 32}}
    done = run(child, "--inputs", "out/manifest.json", out="child/manifest.json")
    assert done.returncode == 1 and "none of its inputs is the start that this step was planned with" in done.stderr
    assert not (tmp_path / "child").exists()


def test_help_is_quick_and_imports_no_heavy_library(tmp_path):
    steps = [
        path.stem for path in (ROOT / "workflow_scripts/steps").glob("*.py") if path.stem not in ("__init__", "score_ifeval")
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {steps}: importlib.import_module(f'workflow_scripts.steps.{{name}}')\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'trl', 'pandas', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
