"""The figures of docs/generation.md are those that were measured (measurements/generation_h200.json)."""

import json

from tests.conftest import ROOT

PAGE = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
MADE = json.loads((ROOT / "measurements/generation_h200.json").read_text())


def row(begins: str) -> list[str]:
    """The cells of a table's row, after its first."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {begins} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_table_of_speeds_is_what_was_measured():
    now, before = MADE["384 rows"], MADE["256 rows"]
    rows = {
        "`generate`, no adapter": (before, ("fixed, hf, plain", None)),
        "`generate`, adapter beside": (before, ("fixed, hf, adapter", None)),
        "`graphs`, no adapter": (now, ("fixed, plain", "mixed, plain")),
        "`graphs`, adapter beside, bf16": (now, ("fixed, adapter", "mixed, adapter")),
        "the same, sampled at temperature 1, with log-probabilities": (now, ("sampled, adapter", None)),
        "`graphs`, adapter beside, fp32": (now, ("fixed, adapter in fp32", "mixed, adapter in fp32")),
    }
    for begins, (made, parts) in rows.items():
        cells = row(begins)
        for cell, part in zip(cells, parts, strict=False):
            assert cell == (f"{made[part]['tokens_per_second']:,}" if part else ""), (begins, part)
        if parts[1]:
            assert cells[2] == f"{made[parts[1]]['peak_gib']:.1f} GiB"


def test_the_table_of_equal_answers_is_what_was_measured():
    for begins, part in {
        "fp32": "fp32", "bf16, adapter rounded to bf16": "bf16", "bf16, adapter in fp32": "bf16 exact",
    }.items():  # fmt: skip
        found = MADE["SmolLM2-135M-Instruct"]["model, 128"][part]
        assert row(begins)[0].startswith(f"{found['equal']}") and row(begins)[0].endswith("541")
        assert found["alone_equal"] == found["in_100_slots_equal"] == [181, 181]


def test_7b_against_generate_and_vllm_are_what_was_measured():
    made, vllm = MADE["7 B, 384 rows, beside generate"], MADE["vllm 0.26"]
    speeds = {name: part["tokens_per_second"] for name, part in made.items() if isinstance(part, dict)}
    assert row("`graphs`, 7 B") == [f"{speeds['fixed, adapter']:,}", f"{speeds['mixed, adapter']:,}"]
    assert row("`generate`, 7 B")[0] == f"{speeds['fixed, hf, adapter']:,}"
    assert f"So {speeds['fixed, adapter'] / speeds['fixed, hf, adapter']:.1f} times as fast" in PAGE
    assert f"`generate` made {speeds['fixed, hf, plain']:,}" in PAGE
    assert f"starts in {int(vllm['start_s'])} s" in PAGE and f"at {vllm['fixed']['tokens_per_second']:,} tokens a second" in PAGE
    assert f"{vllm['agreement']['share']} of peft's effect, standard error {vllm['agreement']['se']}" in PAGE.replace("\n", " ")
    equal, of = vllm["equal_answers_of_64_tokens"]
    assert f"{equal} of {of} greedy answers" in PAGE and f"{vllm['first_tokens_equal']} of {of} first tokens" in PAGE


def test_rollouts_and_the_step_beside_its_bound_are_what_was_measured():
    now = MADE["384 rows"]
    for name, begins in (("ppo", "PPO's rollout in NF4, 0.5 B: 64 answers"), ("grpo", "GRPO's: 32 answers")):
        assert row(f"{begins} of 512 tokens") == [f"{min(now['rollouts'][name]['seconds']):.2f}"]
    for part, step, bound in (("profile", "2.2 ms at 87", "0.34"), ("profile, deep", "3.1 ms at 864", "1.2 ms")):
        made = now[part]
        assert step == f"{made['step_us'] / 1000:.1f} ms at {made['mean_position']}" and step in PAGE and bound in PAGE
        assert abs(made["bound_us"] / 1000 - float(bound.split()[0])) < 0.01
