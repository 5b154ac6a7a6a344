"""Sending an adapter to a hub. Offline; the hub is a fake object."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import errors

from tests.support.tool import edit, tool
from workflow_scripts.artifacts.fingerprint import file_sha256
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import card, push, runs

# -- push ------------------------------------------------------------------------------------------------------------


class FakeHub:
    """What HfApi is to `push`: keeps what it was given, or raises what it is told to."""

    def __init__(self, error: Exception | None = None):
        self.error, self.repos, self.files = error, [], {}

    def create_repo(self, repo, private, exist_ok):
        if self.error:
            raise self.error
        self.repos.append((repo, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.message = commit_message
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return f"hub:{repo_id}"


def test_push_sends_adapter_card_and_manifest_and_nothing_of_the_machine(home):
    hub, run = FakeHub(), runs.open_run(Path("results/dpo"))
    lines = push.push(hub, run, "user/name")
    assert lines[0] == "pushed to hub:user/name" and hub.repos == [("user/name", True, True)]
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "metrics.csv"}
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        assert hub.files[name] == (home / "results/dpo/adapter" / name).read_bytes()
    assert hub.files["README.md"].decode() == card.card(run, "user/name")
    assert run.adapter.fingerprint in hub.message
    assert not list((home / "results/dpo").glob(".push*"))


def test_a_dry_run_lists_and_sends_nothing(home):
    done = tool(home, "push", "results/dpo", "user/name", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("would go to user/name (private if it is new):\n")
    assert {line.split()[-1] for line in done.stdout.splitlines()[1:]} >= {"README.md", "adapter_model.safetensors"}
    assert "run.json" not in done.stdout


def test_push_of_the_fused_model_stands_alone(home):
    run = runs.open_run(Path("results/sft_v2"))
    wanted = (home / "results/sft_v2/merged/model.safetensors").read_bytes()
    (home / "results/sft_v2/merged/model.safetensors").unlink()  # freed: it is rebuilt
    hub = FakeHub()
    push.push(hub, run, "user/name", merged=True, private=False)
    assert hub.repos == [("user/name", False, True)]
    assert hub.files["model.safetensors"] == wanted and "tokenizer.json" in hub.files and "config.json" in hub.files
    text = hub.files["README.md"].decode()
    assert "library_name: transformers" in text and "| train.learning_rate |" in text and "not the plain base" not in text
    with pytest.raises(InputError, match="results/dpo/merged/manifest.json: missing; make it first: snakemake results"):
        push.push(hub, runs.open_run(Path("results/dpo")), "user/name", merged=True)


def test_an_adapter_of_a_hub_model_names_it_by_id_and_revision(home):
    source = {"source": "hub", "hub": {"id": "Qwen/Qwen2.5-0.5B", "revision": "a1" * 20}}
    edit(home / "results/base/manifest.json", step={"config": source})
    hub, run = FakeHub(), runs.open_run(Path("results/sft_v2"))
    push.push(hub, run, "user/name")
    config = json.loads(hub.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("Qwen/Qwen2.5-0.5B", "a1" * 20)
    assert yaml.safe_load(hub.files["README.md"].decode().split("---")[1])["base_model"] == "Qwen/Qwen2.5-0.5B"
    at_home = home / "results/sft_v2/adapter/adapter_config.json"
    assert file_sha256(at_home) == run.adapter.data["files"]["adapter_config.json"]  # untouched


def test_a_changed_file_is_not_pushed(home):
    path = home / "results/dpo/adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    hub = FakeHub()
    with pytest.raises(InputError, match="altered since it was made"):
        push.push(hub, runs.open_run(Path("results/dpo")), "user/name")
    assert not hub.repos and not hub.files


def refusal(code: int) -> Exception:
    error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)  # its own constructor wants a whole response
    Exception.__init__(error, "Authorization: Bearer hf_secret")
    error.response = SimpleNamespace(status_code=code)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (lambda: refusal(401), "the hub answers 401; check the name, and that your token may write there"),
        (lambda: refusal(503), "the hub answers 503; try again later"),
        (lambda: RuntimeError("hf_secret"), "RuntimeError, the hub cannot be reached"),
        (lambda: errors.OfflineModeIsEnabled("x"), r"set to offline \(HF_HUB_OFFLINE\)"),
        (lambda: errors.LocalTokenNotFoundError("x"), "not logged in; run `hf auth login`"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(read_only, error, words):
    with pytest.raises(InputError, match=words) as caught:
        push.upload(FakeHub(error()), Path("."), "user/name", True, "message")
    assert "secret" not in str(caught.value) and caught.value.__suppress_context__


def test_a_name_that_is_none_and_a_base_are_refused(read_only):
    with pytest.raises(InputError, match="name: expected the name of a repository, user/name"):
        push.push(FakeHub(), runs.open_run(Path("results/dpo")), "name")
    with pytest.raises(InputError, match="results/base: has no adapter"):
        push.push(FakeHub(), runs.open_run(Path("results/base")), "user/name")


def test_the_card_says_where_an_objective_has_no_value():
    """KTO's accuracy, where each prompt has one answer: thumbs up or down."""
    facts = {"before": {"accuracy": None, "margin": 0.0}, "after": {"accuracy": None, "margin": 0.25}}
    said = "\n".join(card._objective(facts))
    assert (
        "| accuracy | no value (no prompt has both a wanted and an unwanted answer) |" in said and "| margin | 0 | 0.25 |" in said
    )
