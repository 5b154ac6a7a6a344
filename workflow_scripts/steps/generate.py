"""Answer the evaluation prompts: greedy decoding with the chat template, up to the end of the turn or another token that the
model declares as an end.

Every method is evaluated in one precision, `eval.precision`, as it was trained: the adapter beside the weights of its start,
and not merged into them, which would round small updates away. Before it answers, the model is asked whether the adapter does in
it, on the path that answers, what it did when it was trained (models/distance.py).

Who answers is `generation.backend` (generation/). `graphs` gives each prompt the same answer whatever is answered beside it.
`hf` answers in batches from the longest prompt to the shortest, ties in order of their text, padded on the left: the order and
batches of lm-eval's own runner, so that the scores equal those of its `simple_evaluate`. There the batch size changes greedy
answers a little (padding, kernels), so it is part of the evaluation's fingerprint.

With `eval.shards: N` the prompts (for `hf`, the batches) are shared among N jobs: shard k answers k, k + N, ... and writes them
to one file. The step that gathers the files is the one that would have answered alone, and its outputs are the same, byte for
byte.

    python -m workflow_scripts.steps.generate --step results/dpo/ifeval_responses.manifest.json \\
        --out trial/ifeval_responses.manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/dpo/adapter/manifest.json results/data/ifeval.manifest.json
"""

import json
from pathlib import Path
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli


def tokens_of(tokenizer: Any, prompts: list[list[dict]]) -> tuple[list[str], list[list[int]]]:
    """Prompts, each a conversation that ends with a user's turn, as the text that the model continues, and as its tokens."""
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    return texts, tokenizer(texts, add_special_tokens=False)["input_ids"]


def answer(
    generator: Any, tokenizer: Any, asked: Any, texts: list[str], ids: list[list[int]], label: str,
    saved: Path | None = None, shard: tuple[int, int] = (1, 1),
) -> list[dict]:  # fmt: skip
    """Answers to the prompts of `tokens_of`: `response`, `tokens` (its count, the end of turn included) and `finish_reason` (stop
    or length), in the prompts' order, as many to each as are asked for (`asked.samples`) one after the other.

    `saved`: a file that keeps each answer, so that a killed run does not answer again what it has answered.
    `shard`: (k, n) answers every n-th prompt from the k-th on, or every n-th batch; the other prompts' answers are empty.
    """
    from workflow_scripts.models import chat
    from workflow_scripts.plumbing.progress import Progress

    order = sorted(range(len(texts)), key=lambda i: (-len(ids[i]), texts[i]))
    number, count = shard
    size = generator.size
    mine = [order[first : first + size] for first in range(0, len(order), size)][number - 1 :: count]
    answers = read_answers(saved)
    n = asked.samples
    # A batch is answered whole, and so are all answers to a prompt.
    todo = [rows for rows in mine if any(i * n + sample not in answers for i in rows for sample in range(n))]
    total = n * sum(map(len, mine))
    bar, answered = Progress(total, label), total - n * sum(map(len, todo))

    def done(prompt: int, sample: int, made: Any) -> None:
        nonlocal answered
        i = prompt * n + sample
        text = chat.said(tokenizer, made.tokens[:-1] if made.stopped else made.tokens, texts[prompt])
        finish = "stop" if made.stopped else "length"
        answers[i] = {"response": text, "tokens": len(made.tokens), "finish_reason": finish}
        if saved is not None:
            with open(saved, "a", encoding="utf-8") as file:
                file.write(json.dumps({"row": i, "answer": answers[i]}) + "\n")
        answered += 1
        bar.step(answered)

    generator.answer([[(i, ids[i]) for i in rows] for rows in todo], asked, done)
    bar.close()
    return [answers.get(i, {}) for i in range(n * len(texts))]


def read_answers(saved: Path | None) -> dict[int, dict]:
    """An answer's place -> the answer. A line that a kill cut off ends the file: it is removed, and made again."""
    found: dict[int, dict] = {}
    if saved is None or not saved.exists():
        return found
    whole = []
    for line in saved.read_text(encoding="utf-8").splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            break
        found[one["row"]] = one["answer"]
        whole.append(line + "\n")
    saved.write_text("".join(whole), encoding="utf-8")
    print(f"{len(found)} prompts were answered before: taken over", flush=True)
    return found


def write_shard(job: manifests.Job, parents: dict[str, manifests.Artifact], answers: list[dict], facts: dict) -> None:
    with manifests.complete(job, "answers", parents) as draft:
        draft.manifest["answers"] = {str(i): made for i, made in enumerate(answers) if made}
        draft.manifest["facts"] = facts


def gather(job: manifests.Job, prompts: int) -> tuple[list[dict], dict] | None:
    """(answers, facts for the manifest) put together from the shards among a job's inputs; None if there are none.

    InputError where a shard is another step's, or where some prompts have no answer.
    """
    shards = [manifests.read(path) for path in job.inputs if path.parent.name.endswith("_shards")]
    if not shards:
        return None
    answers: list[dict] = [{} for _ in range(prompts)]
    for shard in shards:
        if shard.fingerprint != fingerprint(job.step | {"shard": shard.data["step"].get("shard")}):
            raise InputError(f"{shard.path}: a shard of other answers than {job.out}; delete it and run snakemake again")
        for i, made in shard.data["answers"].items():
            answers[int(i)] = made
    if missing := sum(not made for made in answers):
        raise InputError(
            f"{job.out}: {missing} of {prompts} prompts have no answer in {shards[0].folder}; delete it and run again"
        )
    return answers, shards[0].data["facts"]


def respond(
    job: manifests.Job,
    parents: dict[str, manifests.Artifact],
    prompts: list[dict],
    label: str,
    decoding: str,
    new: int,
    **drawn: Any,
) -> tuple[list[dict], dict]:
    """(answers, facts for the manifest) of the model; of a shard's prompts only, if the step is a shard.

    label: of its progress; new: tokens of an answer, at most; drawn: fields of `Asked` for answers that are drawn, not greedy.
    """
    from workflow_scripts.data import slicing
    from workflow_scripts.generation import generator
    from workflow_scripts.generation.answers import Asked
    from workflow_scripts.models import chat, device, distance, loading

    config, step, start, adapter = job.config, job.step, parents["start"], parents.get("adapter")
    device.prepare(step)
    quant = config.get("quant")
    model, with_adapter = loading.evaluated(start, adapter, job.work, step["device"], step["precision"], quant)
    tokenizer, turns = chat.tokenizer_of(start), [slicing.prompt_turns(row) for row in prompts]
    chat.decode_as_declared(model, tokenizer, decoding)
    names = [row["key"] if "key" in row else row["id"] for row in prompts]
    chat.check_prompts(tokenizer, [*zip(names, turns, strict=True)], parents["prompts"].path)
    texts, ids = tokens_of(tokenizer, turns)
    slots = min(job.slots, len(ids) * drawn.get("samples", 1))
    who = generator.of(model, tokenizer, config["generation"], slots, max(map(len, ids)) + new)
    by = "graphs" if isinstance(who, generator.InSlots) else f"hf, {who.size} at a time"  # not always whom the config asks for
    facts = {"generation_config": model.generation_config.to_diff_dict(), "answered_by": by}
    if adapter is not None:
        path = who if isinstance(who, generator.InSlots) else distance.Peft(with_adapter)
        facts["distance"] = loading.check(path, adapter, step["precision"], quant)
    saved = job.work / fingerprint(step) / "answers.jsonl"
    saved.parent.mkdir(parents=True, exist_ok=True)
    asked = Asked(tuple(chat.ends(tokenizer, model)), new, **drawn)
    answers = answer(
        who, tokenizer, asked, texts, ids, label, saved, tuple(step.get("shard", (1, 1)))
    )  # fmt: skip
    return answers, facts


def main(job: manifests.Job) -> None:
    from workflow_scripts.plumbing.jsonl import write_jsonl

    parents = job.parents()
    prompts = parents["prompts"].rows()
    config = job.config
    found = gather(job, len(prompts))
    label = f"answers of {job.run}"
    answers, facts = found or respond(job, parents, prompts, label, config["decoding"], config["max_new_tokens"])
    if "shard" in job.step:
        write_shard(job, parents, answers, facts)
        return
    with manifests.complete(job, "responses", parents) as draft:
        keys = ("response", "tokens", "finish_reason")  # in one order, wherever the answers come from
        rows = [
            {"key": row["key"], "prompt": row["prompt"], **{key: made[key] for key in keys}}
            for row, made in zip(prompts, answers, strict=True)
        ]
        write_jsonl(draft.folder / job.out.name.replace(".manifest.json", ".jsonl"), rows)
        draft.manifest |= facts
        draft.run["tokens"] = sum(made["tokens"] for made in answers)


if __name__ == "__main__":
    cli.run(main, __doc__)
