"""The tools for people: chat, status, card. Offline."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import warm_steps
from tests.support.tool import edit, tool
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import card, chat, runs, status

ROOT = Path(__file__).resolve().parents[2]
SHA = {"Qwen/Qwen2.5-0.5B": "a1" * 20, "org/pairs": "b2" * 20, "org/talk": "c3" * 20}


# -- chat ------------------------------------------------------------------------------------------------------------


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results/dpo/ifeval_responses.jsonl").read_text().splitlines()]


def test_chat_gives_the_answers_that_were_evaluated(read_only, monkeypatch, capsys):
    model, tokenizer = chat.load(Path("results/dpo"), "cpu", None, 1)
    rows = answers(read_only)
    for row in rows:
        _, tokens = chat.fit(tokenizer, [{"role": "user", "content": row["prompt"]}], 10**6)
        assert chat.reply(model, tokenizer, tokens, 12, 0.0) == row["response"]
    assert len({row["response"] for row in rows}) > 1
    given = ["chat", "results/dpo", "--prompt", rows[0]["prompt"], "--max-new-tokens", "12", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", given)
    capsys.readouterr()
    chat.main()
    assert capsys.readouterr().out == rows[0]["response"] + "\n"


def test_chat_reads_a_pipe_and_keeps_the_conversation_until_new(read_only):
    model, tokenizer = chat.load(Path("results/dpo"), "cpu", None, 1)
    first = answers(read_only)[0]["prompt"]

    def reply(*turns: str) -> str:
        roles = ["user", "assistant"] * 2
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        return chat.reply(model, tokenizer, chat.fit(tokenizer, messages, 240)[1], 10, 0.0)

    one = reply(first)
    two = reply(first, one, "and the sea?")
    alone = reply("and the sea?")
    command = ("python", "-m", "workflow_scripts.tools.chat", "results/dpo", "--max-new-tokens", "10", "--threads", "1")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = warm_steps().run(command, read_only, env, text=f"{first}\n\nand the sea?\n/new\nand the sea?\n")
    assert done.stdout == f"{one}\n{two}\n{alone}\n", done.stderr
    assert two != alone  # the conversation went in


def test_the_base_and_a_fused_run_talk_too(read_only):
    for folder in ("results/base", "results/sft_v2/merged"):
        model, _ = chat.load(Path(folder), "cpu", "fp32", 1)
        assert not hasattr(model, "peft_config")


def test_sampling_is_repeatable_by_seed_and_differs_from_greedy(read_only, monkeypatch, capsys):
    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # set by the tool: put back after the test

    def said(*more: str) -> str:
        args = ["--prompt", "write about the sea.", "--max-new-tokens", "12", "--threads", "1", *more]
        monkeypatch.setattr(sys, "argv", ["chat", "results/base", *args])
        chat.main()
        return capsys.readouterr().out

    first = said("--temperature", "1", "--seed", "5")
    assert first == said("--temperature", "1", "--seed", "5")
    assert first != said("--temperature", "1", "--seed", "6")
    assert first != said() == said("--seed", "6")


def test_the_oldest_turns_go_first_and_the_system_turn_stays(read_only):
    _, tokenizer = chat.load(Path("results/base"), "cpu", None, 1)
    turns = [{"role": "system", "content": "be brief."}]
    turns += [{"role": role, "content": f"turn {i}"} for i, role in enumerate(["user", "assistant"] * 3 + ["user"])]
    whole = len(chat.fit(tokenizer, turns, 10**6)[1])
    kept, tokens = chat.fit(tokenizer, turns, whole - 1)
    assert kept == [turns[0], *turns[3:]] and len(tokens) < whole
    with pytest.raises(InputError, match="this message takes .* tokens, and there is room for 3; shorten it"):
        chat.fit(tokenizer, turns, 3)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["results/nothing"], "results/nothing: no trained run here.*there is results/base, results/dpo, results/sft_v2"),
        (["results/data"], "results/data: no trained run here"),
        (["results/dpo", "--temperature", "-1"], "--temperature: found -1, expected 0 or above"),
        (["results/dpo", "--max-new-tokens", "0"], "--max-new-tokens: found 0, expected 1"),
        (["results/dpo", "--device", "cuda"], "--device cuda: torch finds no GPU here"),
    ],
)
def test_what_cannot_be_talked_to_is_one_line(read_only, args, words, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["chat", "--threads", "1", *args])
    with pytest.raises(SystemExit) as ended:
        runs.command(chat.main)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert re.search(words, error), error


def made_again(manifest: Path) -> None:
    """As if made by another step: with another seed."""
    step = json.loads(manifest.read_text())["step"] | {"seed": 99}
    edit(manifest, step=step, fingerprint=fingerprint(step))


def test_a_run_whose_start_was_made_again_is_refused(home):
    made_again(home / "results/sft_v2/merged/manifest.json")
    with pytest.raises(InputError, match="made from another start .* run snakemake again"):
        runs.open_run(Path("results/dpo"))


def test_a_tool_run_from_elsewhere_says_where_to_run_it(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run this from the folder in which snakemake ran"):
        runs.open_run(tmp_path / "home/results/dpo")


# -- status ----------------------------------------------------------------------------------------------------------


def phases(results: str = "results") -> dict[str, dict]:
    return {run["run"]: run for run in (status.describe(f, Path(results), 2e9) for f in runs.find(Path(results)))}


def test_status_says_what_is_made_and_how_it_scored(home):
    found = phases()
    assert list(found) == ["base", "dpo", "sft_v2"]
    assert found["base"]["phases"] == {"base": "made", "responses": "-", "scores": "-"}
    assert found["dpo"]["phases"] == {"adapter": "made", "merged": "-", "responses": "made", "scores": "made"}
    assert found["sft_v2"]["phases"] == {"adapter": "made", "merged": "made", "responses": "-", "scores": "-"}
    scores = json.loads((home / "results/ifeval_dpo.json").read_text())
    assert (found["dpo"]["score"], found["dpo"]["prompts"]) == (scores["prompt_level_strict_acc"], 6)
    files = [path for path in (home / "results/dpo").rglob("*") if path.is_file()] + [home / "results/ifeval_dpo.json"]
    assert found["dpo"]["bytes"] == sum(path.stat().st_size for path in files)
    assert found["dpo"]["age_s"] == round(2e9 - max(path.stat().st_mtime for path in files))


def test_status_sees_halves_freed_weights_and_what_a_parent_left_behind(home):
    (home / "results/sft_v2/merged/model.safetensors").unlink()
    (home / "results/dpo/ifeval_responses.manifest.json").unlink()
    (home / "results/half/adapter").mkdir(parents=True)
    (home / "results/half/adapter/adapter_model.safetensors").write_bytes(b"x")
    found = phases()
    assert found["sft_v2"]["phases"]["merged"] == "freed"
    assert found["dpo"]["phases"]["responses"] == "half made"
    assert found["half"]["phases"]["adapter"] == "half made"
    assert found["dpo"]["phases"]["adapter"] == "made"
    (home / "results/dpo/adapter/adapter_config.json").unlink()
    edit(home / "results/base/manifest.json", fingerprint="another")
    found = phases()
    assert found["dpo"]["phases"]["adapter"] == "half made"
    assert found["sft_v2"]["phases"]["adapter"] == "outdated"
    (home / "results/ifeval_dpo.json").write_text("{")
    assert phases()["dpo"]["phases"]["scores"] == "half made"


def test_a_file_with_two_names_counts_once_and_working_folders_do_not(home):
    before = phases()["dpo"]["bytes"]
    (home / "results/.work/abc/done").mkdir(parents=True)
    os.link(home / "results/dpo/adapter/adapter_model.safetensors", home / "results/.work/abc/done/adapter_model.safetensors")
    os.link(home / "results/dpo/adapter/adapter_model.safetensors", home / "results/dpo/again")
    assert phases()["dpo"]["bytes"] == before


def test_status_prints_a_table_and_the_same_as_json(home):
    shutil.copytree(home / "results/dpo", home / "results/other/dpo.seed2")
    shown = tool(home, "status")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split()[:2] == ["run", "base"] and [line.split()[0] for line in lines[1:]] == [
        "base", "dpo", "sft_v2", "other/dpo.seed2",
    ]  # fmt: skip
    assert "+-" in lines[2]
    data = json.loads(tool(home, "status", "results", "--json").stdout)
    assert [run["run"] for run in data["runs"]] == ["base", "dpo", "sft_v2", "other/dpo.seed2"] and data["at_work"] == []
    assert tool(home, "status", "nowhere").stderr.startswith("error: nowhere: no such folder")


def test_status_names_who_is_at_work(home):
    from workflow_scripts.artifacts.work import exclusive

    with exclusive(home / "results/.work", "f" * 32, print):
        (line,) = status.at_work(Path("results"))
        assert line.startswith(f"process {os.getpid()} on ")
    assert status.at_work(Path("results")) == []


def test_status_and_sizes_do_not_mind_a_job_that_removes_its_folders_meanwhile(tmp_path, goes_when_listed):
    old = tmp_path / ".work/f00/trainer/checkpoint-1"
    for file in (old / "optimizer.pt", tmp_path / ".work/locks/f00.lock"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("12345")
    assert status.disk([tmp_path])[0] == 10
    goes_when_listed(old)
    assert status.at_work(tmp_path) == [] and not old.exists()
    old.mkdir()
    (old / "optimizer.pt").write_text("12345")
    assert status.disk([tmp_path])[0] == 5 and not old.exists()


def test_sizes_and_ages_are_readable():
    assert [status.human_bytes(n) for n in (0, 999, 1000, 2_500_000, 10**9, 3 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "2.5 MB", "1.0 GB", "3.0 TB",
    ]  # fmt: skip
    assert [status.human_age(s) for s in (None, 5, 119, 120, 7200, 86400 * 3)] == ["-", "5 s", "119 s", "2 min", "2 h", "3 d"]


# -- card ------------------------------------------------------------------------------------------------------------


def test_the_card_states_method_data_scores_objective_and_fingerprints(read_only):
    text = card.card(runs.open_run(Path("results/dpo")))
    adapter = json.loads(Path("results/dpo/adapter/manifest.json").read_text())
    scores = json.loads(Path("results/ifeval_dpo.json").read_text())
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["phaseline", "dpo", "lora"]}
    assert "licen" not in text.split("---")[1].lower() and "Licence: not stated here." in text
    for metric, name in card.METRICS.items():
        score, error = 100 * scores[metric], 100 * scores[f"{metric}_stderr"]
        n = scores["n_prompts" if metric.startswith("prompt") else "n_instructions"]
        assert f"| {name} | {score:.2f} | {error:.2f} | {n} |" in text
    assert "at most 12 new tokens, fp32" in text
    objective = adapter["objective"]
    assert f"| loss | {objective['before']['loss']:g} | {objective['after']['loss']:g} |" in text
    for fact in ("| train.learning_rate | 0.0005 |", "| lora.r | 16 |", "| train.beta | 0.1 |", "| seed | 1 |"):
        assert fact in text
    assert "| sft | `results/sft_v2` |" in text and "| pairs | `results/dpo` |" in text  # what the start saw counts, too
    for name in ("results/sft_v2/merged/manifest.json", "results/base/manifest.json"):
        assert json.loads(Path(name).read_text())["files"]["model.safetensors"] in text
    assert adapter["fingerprint"] in text
    assert "fits the merged model above, not the plain base" in text


def test_scores_of_another_adapter_stay_out(home):
    assert card.scores_of(runs.open_run(Path("results/dpo"))) is not None
    made_again(home / "results/dpo/adapter/manifest.json")
    assert card.scores_of(runs.open_run(Path("results/dpo"))) is None
    assert "None of this very model yet." in card.card(runs.open_run(Path("results/dpo")))


def test_a_card_is_written_to_a_file_but_not_over_a_manifest(home):
    assert tool(home, "card", "results/dpo", "--out", "CARD.md").returncode == 0
    assert (home / "CARD.md").read_text() == card.card(runs.open_run(Path("results/dpo")))
    before = (home / "results/dpo/adapter/manifest.json").read_text()
    refused = tool(home, "card", "results/dpo", "--out", "results/dpo/adapter/manifest.json")
    assert refused.returncode == 1 and "would be overwritten" in refused.stderr
    assert (home / "results/dpo/adapter/manifest.json").read_text() == before
