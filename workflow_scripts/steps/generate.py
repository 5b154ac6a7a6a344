"""Answer the evaluation prompts: batched greedy decoding with the chat template, up to the end of the turn or another token that
the model declares as an end.

Every method is evaluated in one precision, `eval.precision`, as it was trained: the adapter beside the weights of its start,
and not merged into them, which would round small updates away. Before it answers, the model is asked whether the adapter does in
it what it did when it was trained (models/distance.py).

Prompts are batched from the longest to the shortest, ties in order of their text, padded on the left: the order and batches
of lm-eval's own runner, so that the scores equal those of its `simple_evaluate`. The batch size changes greedy answers a
little (padding, kernels), so it is part of the evaluation's fingerprint.

With `eval.shards: N` the batches are shared among N jobs: shard k answers batches k, k + N, ... and writes them to one file.
The step that gathers the files is the one that would have answered alone, and its outputs are the same, byte for byte.

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


def answer(
    model: Any,
    tokenizer: Any,
    prompts: list[list[dict]],
    batch_size: int,
    max_new_tokens: int,
    label: str,
    saved: Path | None = None,
    shard: tuple[int, int] = (1, 1),
) -> list[dict]:
    """Answers to prompts, each a conversation that ends with a user's turn.

    `response`, `tokens` (its count, the end of turn included) and `finish_reason` (stop or length), in the prompts' order.
    `saved`: a file that keeps each finished batch, so that a killed run does not answer again what it has answered.
    `shard`: (k, n) answers every n-th batch from the k-th on; the other prompts' answers are empty.
    """
    import torch

    from workflow_scripts.models import chat
    from workflow_scripts.plumbing.progress import Progress

    ends = chat.ends(tokenizer, model)
    tokenizer.padding_side = "left"
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(texts)), key=lambda i: (-lengths[i], texts[i]))
    answers: list[dict] = [{} for _ in texts]
    number, count = shard
    mine = [order[first : first + batch_size] for first in range(0, len(order), batch_size)][number - 1 :: count]
    bar = Progress(sum(map(len, mine)), label)
    done, answered = read_batches(saved), 0
    for rows in mine:
        answered += len(rows)
        if (finished := done.get(tuple(rows))) is not None:
            for i, made in zip(rows, finished, strict=True):
                answers[i] = made
            continue
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            generated = model.generate(
                **batch,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                tokenizer=tokenizer,  # for the texts at which a folder may want to stop
            )
        for i, tokens in zip(rows, generated[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((n for n, token in enumerate(tokens, start=1) if token in ends), None)
            stopped, tokens = length is not None, tokens[:length]
            text = chat.said(tokenizer, tokens[:-1] if stopped else tokens, texts[i])
            answers[i] = {"response": text, "tokens": len(tokens), "finish_reason": "stop" if stopped else "length"}
        if saved is not None:
            with open(saved, "a", encoding="utf-8") as file:
                file.write(json.dumps({"rows": rows, "answers": [answers[i] for i in rows]}) + "\n")
        bar.step(answered)
    bar.close()
    return answers


def read_batches(saved: Path | None) -> dict[tuple[int, ...], list[dict]]:
    """Places of a batch's prompts -> its answers. A line that a kill cut off ends the file: it is removed, and made again."""
    found: dict[tuple[int, ...], list[dict]] = {}
    if saved is None or not saved.exists():
        return found
    whole = []
    for line in saved.read_text(encoding="utf-8").splitlines():
        try:
            batch = json.loads(line)
        except ValueError:
            break
        found[tuple(batch["rows"])] = batch["answers"]
        whole.append(line + "\n")
    saved.write_text("".join(whole), encoding="utf-8")
    print(f"{sum(map(len, found))} prompts were answered before: taken over", flush=True)
    return found


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


def respond(job: manifests.Job, parents: dict[str, manifests.Artifact], prompts: list[dict]) -> tuple[list[dict], dict]:
    """(answers, facts for the manifest) of the model; of a shard's prompts only, if the step is a shard."""
    from workflow_scripts.data import slicing
    from workflow_scripts.models import chat, device, loading

    config, step, start = job.config, job.step, parents["start"]
    device.prepare(step)
    model, does = loading.evaluated(
        start, parents.get("adapter"), job.work, step["device"], step["precision"], config.get("quant")
    )
    tokenizer, asked = chat.tokenizer_of(start), [slicing.prompt_turns(row) for row in prompts]
    chat.decode_as_declared(model, tokenizer, config["decoding"])
    saved = job.work / fingerprint(step) / "answers.jsonl"
    saved.parent.mkdir(parents=True, exist_ok=True)
    keys = [row["key"] for row in prompts]
    chat.check_prompts(tokenizer, [*zip(keys, asked, strict=True)], parents["prompts"].path)
    answers = answer(
        model, tokenizer, asked, config["batch_size"], config["max_new_tokens"], f"answers of {job.run}", saved,
        tuple(step.get("shard", (1, 1))),
    )  # fmt: skip
    acted = {"generation_config": model.generation_config.to_diff_dict()}
    return answers, acted | ({"distance": does} if does else {})


def main(job: manifests.Job) -> None:
    from workflow_scripts.plumbing.jsonl import write_jsonl

    parents = job.parents()
    prompts = parents["prompts"].rows()
    answers, facts = gather(job, len(prompts)) or respond(job, parents, prompts)
    if "shard" in job.step:
        with manifests.complete(job, "answers", parents) as draft:
            draft.manifest["answers"] = {str(i): made for i, made in enumerate(answers) if made}
            draft.manifest["facts"] = facts
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
