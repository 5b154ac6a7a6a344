"""Filling in revisions. Offline; a hub is a fake object."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.tools.test_push import refusal
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import pin

ROOT = Path(__file__).resolve().parents[2]
SHA = {"Qwen/Qwen2.5-0.5B": "a1" * 20, "org/pairs": "b2" * 20, "org/talk": "c3" * 20}


# -- pin -------------------------------------------------------------------------------------------------------------

OPEN = """\
# My study.
base:
  source: hub
  hub:
    id: Qwen/Qwen2.5-0.5B    # the small one
    # the rest stays as it is
data:
  slices:
    pairs: {kind: preference, source: {hub: {id: org/pairs, split: train}}, rows: 9}   # flow
    talk:
      source:
        hub: {id: org/talk, revision: null}
    branch: {source: {hub: org/pairs, revision: main}}
    empty:
      source:
        hub:
          revision:    # to be found
          id: org/talk
    done: {source: {hub: {id: org/talk, revision: "%s"}}}
    local: {source: {path: a.jsonl}}
""" % ("d4" * 20)


class FakeNames:
    def __init__(self):
        self.asked = []

    def _info(self, kind, name, revision):
        self.asked.append((kind, name, revision))
        return SimpleNamespace(sha=SHA[name])

    def model_info(self, name, revision=None):
        return self._info("model", name, revision)

    def dataset_info(self, name, revision=None):
        return self._info("dataset", name, revision)


def test_pin_fills_in_what_is_open_and_touches_nothing_else():
    hub = FakeNames()
    text, made = pin.pin(OPEN, hub)
    wanted = yaml.safe_load(OPEN)
    wanted["base"]["hub"]["revision"] = SHA["Qwen/Qwen2.5-0.5B"]
    slices = wanted["data"]["slices"]
    slices["pairs"]["source"]["hub"]["revision"] = slices["branch"]["source"]["revision"] = SHA["org/pairs"]
    slices["talk"]["source"]["hub"]["revision"] = slices["empty"]["source"]["hub"]["revision"] = SHA["org/talk"]
    assert yaml.safe_load(text) == wanted
    for comment in ("# My study.", "# the small one", "# the rest stays as it is", "# flow", "# to be found"):
        assert comment in text
    assert f"    id: Qwen/Qwen2.5-0.5B    # the small one\n    revision: {SHA['Qwen/Qwen2.5-0.5B']}\n" in text
    assert len(text.splitlines()) == len(OPEN.splitlines()) + 1
    assert hub.asked == [
        ("model", "Qwen/Qwen2.5-0.5B", None), ("dataset", "org/pairs", None), ("dataset", "org/talk", None),
        ("dataset", "org/pairs", "main"), ("dataset", "org/talk", None),
    ]  # fmt: skip
    assert pin.pin(text, FakeNames()) == (text, []) and len(made) == 5


def test_a_commit_of_digits_alone_stays_text():
    text, _ = pin.pin("base: {hub: {id: m}}\n", SimpleNamespace(model_info=lambda *a, **k: SimpleNamespace(sha="1" * 40)))
    assert yaml.safe_load(text)["base"]["hub"]["revision"] == "1" * 40


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            lambda: __import__("huggingface_hub").errors.OfflineModeIsEnabled("x"),
            "set to offline .* write its commit yourself",
        ),
        (lambda: refusal(404), "the hub answers 404 to this name; check the name"),
        (lambda: ConnectionError("no route"), r"no answer from the hub \(ConnectionError\); run this where there is a network"),
    ],
)
def test_without_an_answer_pin_says_which_source_is_open(error, words):
    def raising(*args, **kwargs):
        raise error()

    with pytest.raises(InputError, match="^base.hub: model Qwen/Qwen2.5-0.5B: .*" + words):
        pin.pin(OPEN, SimpleNamespace(model_info=raising, dataset_info=raising))
    with pytest.raises(InputError, match="expected a commit of 40 hex digits"):
        pin.pin(OPEN, SimpleNamespace(model_info=lambda *a, **k: SimpleNamespace(sha=None)))


def test_pin_writes_the_file_and_offline_leaves_it_alone(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    file = tmp_path / "mine.yaml"
    file.write_text(OPEN)
    monkeypatch.setattr(sys, "argv", ["pin", "--configfile", str(file)])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeNames)
    pin.main()
    assert file.read_text() == pin.pin(OPEN, FakeNames())[0]
    assert f"{file}: base.hub: Qwen/Qwen2.5-0.5B (no revision) -> {SHA['Qwen/Qwen2.5-0.5B']}" in capsys.readouterr().out
    pin.main()
    assert "nothing to pin" in capsys.readouterr().out
    file.write_text(OPEN)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "workflow_scripts.tools.pin", "--configfile", str(file)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: base.hub: model Qwen/Qwen2.5-0.5B: huggingface_hub is set to offline")
    assert file.read_text() == OPEN
