"""Answers: decoding against a loop by hand, and scores against lm-eval's own runner on the same model and prompts."""

import json

import pytest
import torch

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.evaluation import ifeval
from workflow_scripts.generation import generator
from workflow_scripts.generation.answers import Asked
from workflow_scripts.models import chat, loading
from workflow_scripts.plumbing.jsonl import read_jsonl
from workflow_scripts.steps import generate
from workflow_scripts.tiny import world

pytestmark = pytest.mark.trained
NEW_TOKENS = 21  # some answers of this model are shorter, most are cut: many end after 22
BATCH = 7
METRICS = [f"{level}_level_{kind}_acc" for level in ("prompt", "inst") for kind in ("strict", "loose")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that has learned to write sentences and to stop, and follows a fifth of such prompts; a file, so everywhere."""
    return small_steps.copy_tiny_base(tmp_path_factory.mktemp("parity") / "base")


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    return loading.load(manifests.read(base), tmp_path_factory.mktemp("work"), "cpu", "fp32").eval()


@pytest.fixture
def tokenizer(base):
    return chat.tokenizer_of(manifests.read(base))


@pytest.fixture(scope="module")
def rows():
    return world.eval_rows(60, seed=3)


@pytest.fixture(scope="module", params=["graphs", "hf"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def responses(base, rows, backend, tmp_path_factory):
    """The rows that the step itself writes."""
    folder = tmp_path_factory.mktemp("responses")
    prompts = small_steps.write_slice(folder, "ifeval", rows, heldout=0)
    out = folder / "base" / "ifeval_responses.manifest.json"
    config = small_steps.answering(NEW_TOKENS, BATCH if backend == "hf" else 0)
    made = small_steps.run(small_steps.job("generate", out, {"start": base, "prompts": prompts}, config))
    return read_jsonl(made.file("ifeval_responses.jsonl"))


def test_the_answers_are_those_of_a_greedy_loop(model, tokenizer, rows, responses):
    for row, made in list(zip(rows, responses, strict=True))[:20]:
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        new: list[int] = []
        while len(new) < NEW_TOKENS and end not in new:
            with torch.no_grad():
                new.append(int(model(torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1].argmax()))
        stopped = new[-1] == end
        assert made["response"] == tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True)
        assert (made["tokens"], made["finish_reason"]) == (len(new), "stop" if stopped else "length")


def test_some_answers_stop_and_some_are_cut_and_none_shows_a_special_token(rows, responses, tokenizer, figure):
    assert [(row["key"], row["prompt"]) for row in responses] == [(row["key"], row["prompt"]) for row in rows]
    stopped = [row for row in responses if row["finish_reason"] == "stop"]
    figure("answers that stop, of 60", len(stopped), at_least=4, at_most=56)
    figure("lengths among them", len({row["tokens"] for row in stopped}), at_least=2)
    assert all(row["tokens"] == NEW_TOKENS for row in responses if row["finish_reason"] == "length")
    assert not [row for row in responses if any(token in row["response"] for token in tokenizer.all_special_tokens)]


def answers(who, model, tokenizer, rows, new):
    texts, ids = generate.tokens_of(tokenizer, [[{"role": "user", "content": row["prompt"]}] for row in rows])
    return generate.answer(who, tokenizer, Asked(tuple(chat.ends(tokenizer, model)), new), texts, ids, "x")


def test_the_order_of_the_prompts_changes_nothing(base, backend, tokenizer, rows, responses, tmp_path):
    model = loading.load(manifests.read(base), tmp_path, "cpu", "fp32").eval()
    who = {"hf": generator.InBatches(model, tokenizer, BATCH), "graphs": generator.InSlots(model, 23, 128, False)}[backend]
    back = answers(who, model, tokenizer, rows[::-1], NEW_TOKENS)[::-1]
    assert back == [{key: row[key] for key in ("response", "tokens", "finish_reason")} for row in responses]


def test_prompts_are_padded_on_the_left(model, tokenizer, rows, monkeypatch):
    seen = []
    right = type(model).generate

    def spy(self, **given):
        seen.append(given)
        return right(self, **given)

    monkeypatch.setattr(type(model), "generate", spy)
    answers(generator.InBatches(model, tokenizer, BATCH), model, tokenizer, rows[:14], 2)
    masks = [mask for given in seen for mask in given["attention_mask"]]
    assert len(masks) == 14 and any((mask == 0).any() for mask in masks)
    for mask in masks:
        assert mask.tolist() == sorted(mask.tolist()) and mask[-1] == 1
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for given in seen:  # the last two words of each row open the assistant's turn
        assert (given["input_ids"][:, -3] == start).all()


YAML = """
task: ifeval_here
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}}}, cache_dir: {cache}}}
output_type: generate_until
test_split: train
num_fewshot: 0
doc_to_text: prompt
doc_to_target: 0
generation_kwargs: {{until: [], do_sample: false, temperature: 0.0, max_gen_toks: {tokens}}}
process_results: !function here.process_results
metric_list:
  - {{metric: prompt_level_strict_acc, aggregation: mean, higher_is_better: true}}
  - {{metric: inst_level_strict_acc, aggregation: !function here.agg_inst_level_acc, higher_is_better: true}}
  - {{metric: prompt_level_loose_acc, aggregation: mean, higher_is_better: true}}
  - {{metric: inst_level_loose_acc, aggregation: !function here.agg_inst_level_acc, higher_is_better: true}}
"""


def test_scores_and_verdicts_equal_those_of_lm_evals_own_runner(model, tokenizer, rows, responses, tmp_path, figure):
    with ifeval.reference():
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        data = tmp_path / "prompts.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = tmp_path / "task"
        task.mkdir()
        (task / "here.yaml").write_text(YAML.format(data=data, cache=tmp_path / "cache", tokens=NEW_TOKENS))
        (task / "here.py").write_text("from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results\n")
        theirs = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device="cpu"),
            tasks=["ifeval_here"],
            task_manager=TaskManager(include_path=str(task), include_defaults=False),
            apply_chat_template=True,
            log_samples=True,
            bootstrap_iters=2,
        )
    ours = ifeval.score(rows, responses, strip_think=False)
    samples = {sample["doc"]["key"]: sample for sample in theirs["samples"]["ifeval_here"]}
    assert {key: sample["resps"][0][0] for key, sample in samples.items()} == {r["key"]: r["response"] for r in responses}
    for verdict in ours["per_prompt"]:
        for kind in ("strict", "loose"):
            flags, sample = verdict[f"follow_instruction_list_{kind}"], samples[verdict["key"]]
            assert flags == sample[f"inst_level_{kind}_acc"] and all(flags) == sample[f"prompt_level_{kind}_acc"]
    for metric in METRICS:
        assert ours[metric] == pytest.approx(theirs["results"]["ifeval_here"][f"{metric},none"], abs=1e-12)
        figure(f"{metric}, of 60 prompts", ours[metric], at_least=1 / 60, at_most=59 / 60)
    for metric in METRICS[:2]:  # lm-eval has none at the instruction level
        assert ours[f"{metric}_stderr"] == pytest.approx(theirs["results"]["ifeval_here"][f"{metric}_stderr,none"], abs=1e-12)
