"""What rejection sampling does, for real, in small: kept right its rows teach, and with the worst kept as the best they spoil."""

import pytest

from tests.support import small_steps
from tests.support.processors import SEED
from workflow_scripts.artifacts import manifests
from workflow_scripts.evaluation import ifeval
from workflow_scripts.tiny import world

pytestmark = [pytest.mark.slow, pytest.mark.trained]
DATA = {"max_drop": 0.05, "max_prompt_tokens": 96, "decontaminate": {"rule": "whole_prompt", "ngram": 8, "share": 0.5}}


def test_the_best_of_eight_teach_and_the_worst_kept_as_the_best_spoil(speaking_base, tmp_path, figure):
    asked = small_steps.instructions_slice(tmp_path / "data", 240)
    source = {"sampled": {"n": 8, "temperature": 1.0, "max_new_tokens": 48}}
    config = {"rows": 240, "seed": SEED, "source": source, "generation": {"backend": "graphs", "adapter": "match"}}
    parents = {"start": speaking_base, "prompts": asked}
    answers = small_steps.run(small_steps.job("sample", tmp_path / "best.answers.manifest.json", parents, config))
    rows = world.eval_rows(120, seed=1, split="eval")
    judged = small_steps.write_slice(tmp_path / "data", "ifeval", [{**row, "key": i} for i, row in enumerate(rows)], heldout=0)

    def score(adapter: manifests.Artifact | None, name: str) -> float:
        """Share of the instructions of other prompts that greedy answers follow."""
        parents = {"start": speaking_base, "prompts": judged} | ({"adapter": adapter.path} if adapter else {})
        out = tmp_path / name / "ifeval_responses.manifest.json"
        made = small_steps.run(small_steps.job("generate", out, parents, small_steps.answering(48)))
        return ifeval.score(manifests.read(judged).rows(), made.rows(), False)["inst_level_strict_acc"]

    def trained(name: str, **how) -> float:
        config = {"kind": "sft", "heldout": 20, "source": {"sampled": {"keep": "best"} | how}, "reward": {"ifeval": 1.0}} | DATA
        given = {"base": speaking_base, "prompts": asked, "answers": answers.path}
        chosen = small_steps.run(small_steps.job("choose_rows", tmp_path / name / "best.manifest.json", given, config))
        return score(small_steps.train(tmp_path / name, "sft_v2", speaking_base, chosen.path, num_train_epochs=2), name)

    before, best, worst = score(None, "base"), trained("best"), trained("worst", flip_labels=True)
    figure("instructions followed more after the best of eight", best - before, at_least=0.05)
    figure("instructions followed less after the worst of eight", before - worst, at_least=0.02)
