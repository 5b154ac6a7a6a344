"""MMLU and TruthfulQA: lm-eval's own figures, what a model was taught to choose, ties, prompts that do not fit."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support import small_steps
from tests.support.choice_rows import DEV, MMLU, SHOTS, SUBJECTS, TRUTH, question, scored, truth
from tests.support.slicer import chat_row
from workflow_scripts.evaluation import lm_tasks

pytestmark = pytest.mark.usefixtures("undescribed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_steps.write_base(tmp_path_factory.mktemp("choice") / "base", shape={"max_position_embeddings": 1024})


def own_lm_eval(folder: Path, base: Path, definitions: dict[str, tuple[str, dict]], **settings) -> dict:
    """lm-eval by itself: the model from its folder, the rows by its JSON loader, in tasks that include its own definitions.

    definitions: task -> (lm-eval's file, split -> rows).
    """
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks import __file__ as tasks

    (folder / "own").mkdir(parents=True)
    for name, (file, splits) in definitions.items():
        paths = {}
        for split, rows in splits.items():
            paths[split] = str(folder / f"{name}_{split}.jsonl")
            Path(paths[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": paths, "cache_dir": str(folder / "cache")},
        }
        more = {"include": str(Path(tasks).parent / file), "task": name, **data}
        (folder / "own" / f"{name}.yaml").write_text(yaml.safe_dump(more))
    group = {"group": "own", "task": list(definitions), "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / "own" / "group.yaml").write_text(yaml.safe_dump(group))
    return lm_eval.simple_evaluate(
        "hf", {"pretrained": str(base.parent), "dtype": "float32"}, ["own"], batch_size=4, device="cpu",
        task_manager=TaskManager(include_path=str(folder / "own"), include_defaults=False), **settings,
    )  # fmt: skip


# -- lm-eval ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        SHOTS,
        SHOTS | {"fewshot_as_multiturn": False},
        {"shots": 2, "apply_chat_template": False},
        {"shots": 0, "apply_chat_template": True},
    ],
    ids=["turns", "one turn", "plain text", "no shots"],
)
def test_mmlu_has_lm_evals_figures(base, tmp_path, settings):
    made = scored(tmp_path, "mmlu", base, MMLU, **settings)
    definitions = {
        f"own_{subject}": (
            f"mmlu/default/mmlu_{subject}.yaml",
            {split: [row for row in rows if row["subject"] == subject] for split, rows in (("test", MMLU), ("dev", DEV))},
        )
        for subject in SUBJECTS
    }
    more = {key: value for key, value in settings.items() if key != "shots"}
    own = own_lm_eval(tmp_path, base, definitions, num_fewshot=settings["shots"], **more)
    assert made["acc"] == pytest.approx(own["groups"]["own"]["acc,none"], abs=1e-9)
    verdicts = {row["key"]: row["correct"] for row in made["per_prompt"]}
    assert [row["key"] for row in made["per_prompt"]] == [row["key"] for row in MMLU]
    for subject, n in SUBJECTS.items():
        result, part = own["results"][f"own_{subject}"], made["by_subject"][subject]
        assert part["n"] == n and part["acc"] == pytest.approx(result["acc,none"], abs=1e-9)
        assert part["acc_stderr"] == pytest.approx(result["acc_stderr,none"], abs=1e-9)
        assert [verdicts[one["doc"]["key"]] for one in own["samples"][f"own_{subject}"]] == [
            bool(one["acc"]) for one in own["samples"][f"own_{subject}"]
        ]
    first = next(one for one in own["samples"]["own_anatomy"] if one["doc"]["key"] == made["per_prompt"][0]["key"])
    assert made["example"] == {"prompt": first["arguments"][0][0], "options": [option for _, option in first["arguments"]]}
    assert made["example"]["prompt"].count("Answer:") == settings["shots"] + 1
    assert made["cut"] == made["tied"] == 0 and sum(made["chosen"]) == made["n_prompts"] == 16
    assert {name: part["n"] for name, part in made["by_group"].items()} == {"stem": 5, "humanities": 4, "other": 7}


@pytest.mark.parametrize("chat", [True, False])
def test_truthfulqa_has_lm_evals_figures(base, tmp_path, chat):
    made = scored(tmp_path, "truthfulqa", base, TRUTH, apply_chat_template=chat)
    definitions = {f"own_{one}": (f"truthfulqa/truthfulqa_{one}.yaml", {"validation": TRUTH}) for one in ("mc1", "mc2")}
    own = own_lm_eval(tmp_path, base, definitions, apply_chat_template=chat)
    for metric, task in (("acc", "own_mc1"), ("mc2", "own_mc2")):
        assert made[metric] == pytest.approx(own["results"][task]["acc,none"], abs=1e-9)
        assert made[f"{metric}_stderr"] == pytest.approx(own["results"][task]["acc_stderr,none"], abs=1e-9)
    assert 0 < made["mc2"] < 1 and made["mc2_stderr"] > 0
    assert [row["mc2"] for row in made["per_prompt"]] == pytest.approx(
        [one["acc"] for one in own["samples"]["own_mc2"]], abs=1e-9
    )
    assert made["example"]["options"][0] == ("" if chat else " ") + TRUTH[0]["mc1_targets"]["choices"][0]


def test_the_groups_are_those_of_the_paper():
    found = list(lm_tasks.groups(lm_tasks.manager()).values())
    assert {group: found.count(group) for group in found} == {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}


# -- what a model chooses -----------------------------------------------------------------------------------------------------


@pytest.mark.trained
def test_a_model_that_was_taught_one_letter_gets_the_accuracy_of_that_letter(base, tmp_path, figure):
    """Through the adapter: it is trained on the base to say C, and the base does not."""
    text = "{question}\nA. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:"
    rows = [
        chat_row(text.format(*row["choices"], question=row["question"].strip()), "C")
        for row in (question(i, "", 0) for i in range(80))
    ]
    adapter = small_steps.train(
        tmp_path, "sft_v2", base, small_steps.write_slice(tmp_path / "data", "sft", rows), max_length=512, learning_rate=1.0e-2
    ).path
    asked = [row | {"answer": 2 if i < 12 else 3} for i, row in enumerate(MMLU)]
    made = scored(tmp_path / "mmlu", "mmlu", base, asked, adapter=adapter, shots=0, apply_chat_template=True)
    assert made["chosen"] == [0, 0, 16, 0] and made["acc"] == 12 / 16
    assert [row["correct"] for row in made["per_prompt"]] == [True] * 12 + [False] * 4
    assert made["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 15))
    before = scored(tmp_path / "base", "mmlu", base, asked, shots=0, apply_chat_template=True)
    figure("times that the base says it, of 16", before["chosen"][2], at_most=15)


def test_a_model_that_knows_nothing_takes_the_first_and_the_ties_are_counted(base, tmp_path):
    empty = small_steps.copy_base(base, tmp_path / "empty")
    weights = empty.parent / "model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    small_steps.write_manifest(empty, "base", "empty", ["model.safetensors", "config.json"])
    made = scored(tmp_path, "mmlu", empty, MMLU, **SHOTS)
    assert made["tied"] == 16 and made["chosen"] == [16, 0, 0, 0]
    assert made["acc"] == sum(row["answer"] == 0 for row in MMLU) / 16


def test_prompts_that_do_not_fit_are_counted(tmp_path):
    short = small_steps.write_base(tmp_path / "base")  # reads 256 tokens
    assert scored(tmp_path, "mmlu", short, MMLU, **SHOTS)["cut"] == 16


def test_the_logits_of_the_options_alone_are_asked_for_and_give_what_all_would(base):
    """Rows of one batch differ in length, and one ends with the token whose number is lm-eval's padding."""
    from workflow_scripts.artifacts import manifests
    from workflow_scripts.models import chat, loading

    start = manifests.read(base)
    model = loading.load(start, base.parent, "cpu", "fp32").eval()
    pairs = [([5, 6, 7, 8, 9, 10, 11, 12], [3, 4, 5]), ([9, 8, 7, 6, 5, 4], [7]), ([5, 0, 6, 7, 0], [0, 0]), ([4, 5, 0], [0, 9])]
    lm, kept, real = lm_tasks.runner(model, chat.tokenizer_of(start), 4, "options"), [], model.forward

    def forward(*args, **more):
        kept.append(more["logits_to_keep"])
        return real(*args, **more)

    model.forward = forward
    found = lm._loglikelihood_tokens([(("", str(i)), *pair) for i, pair in enumerate(pairs)])
    model.forward = real
    for (context, option), (likelihood, _) in zip(pairs, found, strict=True):
        logits = model(torch.tensor([context + option[:-1]])).logits[0, -len(option) :].log_softmax(-1)
        assert likelihood == pytest.approx(logits[range(len(option)), option].sum().item(), rel=1e-5)
    assert kept == [10 - 2 + 3]  # of 10: the last row's own tokens end after 2, the longest option has 3

    kept.clear()
    model.forward = forward
    lm._loglikelihood_tokens([(("", str(i)), [3, i + 4] * 20, [i + 5, 7]) for i in range(4)])
    assert kept == [2]


def test_mc2_of_answers_that_lm_eval_could_not_tell_from_impossible_ones():
    sample = {
        "doc": truth(0),
        "filtered_resps": [(-2000.0, False), (-2000.0 + math.log(2), False), (-2000.0, False), (-3000.0, False)],
    }
    assert lm_tasks.share_of_the_true(sample) == pytest.approx(3 / 4)
