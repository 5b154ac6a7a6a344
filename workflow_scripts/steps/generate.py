"""Answer the evaluation prompts: greedy decoding with the chat template, up to the end of the turn or another token that the
model declares as an end.

Every method is evaluated in one precision, `eval.precision`, as it was trained: the adapter beside the weights of its start,
and not merged into them, which would round small updates away. Before it answers, the model is asked whether the adapter does in
it, on the path that answers, what it did when it was trained (models/distance.py).

Who answers is `generation.backend` (generation/). `graphs` gives each prompt the same answer whatever is answered beside it.
`hf` answers in batches from the longest prompt to the shortest, ties in order of their text, padded on the left: the order and
batches of lm-eval's own runner, so that the scores equal those of its `simple_evaluate`. There the batch size changes greedy
answers a little (padding, kernels), so it is part of the evaluation's fingerprint. So are the chunks of `vllm`, an option.

With `eval.shards: N` the prompts (for `hf`, the batches) are shared among N jobs: shard k answers k, k + N, ... and writes them
to one file. The step that gathers the files is the one that would have answered alone, and its outputs are the same, byte for
byte.

Where a task has `samples`, each prompt has so many answers, drawn at its `temperature` and as `eval.drawn` says. An answer's
draws come from a stream of its own, made from the seed, the prompt's place and the answer's number, so that it is the same
whatever is answered beside it, after a kill too. In the file of answers each has a row, with its number under `sample`.

    python -m workflow_scripts.steps.generate --step results/dpo/ifeval_responses.manifest.json \\
        --out trial/ifeval_responses.manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/dpo/adapter/manifest.json results/data/ifeval.manifest.json
"""

import json
from functools import partial
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
    """Answers to the prompts of `tokens_of`, `asked.samples` to each: `response`, `tokens` (its count, the end of turn included)
    and `finish_reason` (stop or length), in the prompts' order, those to one prompt side by side.

    `saved`: a file that keeps each answer, so that a killed run does not answer again what it has answered.
    `shard`: (k, n) answers every n-th prompt from the k-th on, or every n-th batch; the other prompts' answers are empty.
    """
    from workflow_scripts.models import chat
    from workflow_scripts.plumbing.progress import Progress

    order = sorted(range(len(texts)), key=lambda i: (-len(ids[i]), texts[i]))
    number, count = shard
    size = generator.size
    mine = [order[first : first + size] for first in range(0, len(order), size)][number - 1 :: count]
    answers, each = read_answers(saved), range(asked.samples)
    # A batch is answered whole, and so is a prompt with several answers.
    todo = [rows for rows in mine if any((i, sample) not in answers for i in rows for sample in each)]
    total = sum(map(len, mine)) * asked.samples
    bar, answered = Progress(total, label), total - sum(map(len, todo)) * asked.samples

    def done(i: int, sample: int, made: Any) -> None:
        nonlocal answered
        text = chat.said(tokenizer, made.tokens[:-1] if made.stopped else made.tokens, texts[i])
        finish = "stop" if made.stopped else "length"
        answers[i, sample] = {"response": text, "tokens": len(made.tokens), "finish_reason": finish}
        if saved is not None:
            which = {"row": i, "sample": sample} if asked.samples > 1 else {"row": i}
            with open(saved, "a", encoding="utf-8") as file:
                file.write(json.dumps(which | {"answer": answers[i, sample]}) + "\n")
        answered += 1
        bar.step(answered)

    generator.answer([[(i, ids[i]) for i in rows] for rows in todo], asked, done)
    bar.close()
    return [answers.get((i, sample), {}) for i in range(len(texts)) for sample in each]


def asked_of(config: dict, ends: tuple[int, ...], new: int) -> Any:
    """How a step's prompts are answered: greedy, or drawn as its `drawn` says, each answer from a stream of its own."""
    from workflow_scripts.generation.answers import Asked

    return Asked(ends, new, **config.get("drawn", {}))


def read_answers(saved: Path | None) -> dict[tuple[int, int], dict]:
    """(a prompt's place, the answer's number) -> the answer. A line that a kill cut off ends the file: it is removed, and made
    again."""
    found: dict[tuple[int, int], dict] = {}
    if saved is None or not saved.exists():
        return found
    whole = []
    for line in saved.read_text(encoding="utf-8").splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            break
        found[one["row"], one.get("sample", 0)] = one["answer"]
        whole.append(line + "\n")
    saved.write_text("".join(whole), encoding="utf-8")
    prompts = len({row for row, _ in found})
    print(f"{prompts} prompts were answered before: taken over", flush=True)
    return found


def write_shard(job: manifests.Job, parents: dict[str, manifests.Artifact], answers: list[dict], facts: dict) -> None:
    with manifests.complete(job, "answers", parents) as draft:
        draft.manifest["answers"] = {str(i): made for i, made in enumerate(answers) if made}
        draft.manifest["facts"] = facts


def gather(job: manifests.Job, count: int) -> tuple[list[dict], dict] | None:
    """(answers, facts for the manifest) put together from the shards among a job's inputs; None if there are none.

    count: of answers. InputError where a shard is another step's, or where some are missing.
    """
    shards = [manifests.read(path) for path in job.inputs if path.parent.name.endswith("_shards")]
    if not shards:
        return None
    answers: list[dict] = [{} for _ in range(count)]
    for shard in shards:
        if shard.fingerprint != fingerprint(job.step | {"shard": shard.data["step"].get("shard")}):
            raise InputError(f"{shard.path}: a shard of other answers than {job.out}; delete it and run snakemake again")
        for i, made in shard.data["answers"].items():
            answers[int(i)] = made
    if missing := sum(not made for made in answers):
        raise InputError(f"{job.out}: {missing} of {count} answers are not in {shards[0].folder}; delete it and run again")
    return answers, shards[0].data["facts"]


def samples_of(config: dict) -> int:
    """Answers to each prompt."""
    return config.get("drawn", {}).get("samples", 1)


def respond(
    job: manifests.Job, parents: dict[str, manifests.Artifact], prompts: list[dict], settings: dict | None = None, label: str = ""
) -> tuple[list[dict], dict]:
    """(answers, facts for the manifest) of the model; of a shard's prompts only, if the step is a shard.

    settings: `max_new_tokens`, `decoding` and, for answers that are drawn, `drawn`; where none are given, those of the step's
    config. label: of its progress, if not the run's.
    """
    from workflow_scripts.data import slicing
    from workflow_scripts.models import chat, device, loading

    config, step, start, adapter = job.config, job.step, parents["start"], parents.get("adapter")
    device.prepare(step, job.deterministic)
    models = loading.evaluated(start, adapter, job.work, step["device"], step["precision"], config.get("quant"))
    model = models[0]
    tokenizer, turns = chat.tokenizer_of(start), [slicing.prompt_turns(row) for row in prompts]
    settings = settings or config
    chat.decode_as_declared(model, tokenizer, settings["decoding"])
    names = [row["key"] if "key" in row else row["id"] for row in prompts]
    chat.check_prompts(tokenizer, [*zip(names, turns, strict=True)], parents["prompts"].path)
    texts, ids = tokens_of(tokenizer, turns)
    new = settings["max_new_tokens"]
    who, facts = who_answers(job, models, (start, adapter), ids, new, samples_of(settings), tokenizer)
    saved = job.work / fingerprint(step) / "answers.jsonl"
    saved.parent.mkdir(parents=True, exist_ok=True)
    asked = asked_of(settings, tuple(chat.ends(tokenizer, model)), new)
    label = label or f"answers of {job.run}"
    return answer(who, tokenizer, asked, texts, ids, label, saved, tuple(step.get("shard", (1, 1)))), facts


def who_answers(
    job: manifests.Job, models: tuple[Any, Any], parts: tuple[Any, Any], ids: list[list[int]], new: int, samples: int,
    tokenizer: Any,
) -> tuple[Any, dict]:  # fmt: skip
    """(the generator, facts for the manifest: who it is, which settings of the folder act, what the adapter does on that path).

    models: of `loading.evaluated`; parts: the artifacts, start and adapter.
    """
    from workflow_scripts.generation import generator
    from workflow_scripts.models import distance, loading

    (model, with_adapter), (start, adapter), settings = models, parts, job.config["generation"]
    facts = {"generation_config": model.generation_config.to_diff_dict()}
    length = max(max(map(len, ids)) + new, distance.longest(adapter))
    found = partial(loading.check, adapter=adapter, dtype=job.step["precision"], quant=job.config.get("quant"))
    if settings["backend"] == "vllm":
        if adapter is not None:
            facts["distance"] = found(distance.Peft(with_adapter))
        engine, more = served(job, models, start, adapter, length)
        return engine, facts | more
    who: Any = generator.of(model, tokenizer, settings, min(job.slots, len(ids) * samples), length)
    slots = isinstance(who, generator.InSlots)
    facts["answered_by"] = "graphs" if slots else f"hf, {who.size} at a time"  # not always whom the config asks for
    if adapter is not None:
        facts["distance"] = found(who if slots else distance.Peft(with_adapter))
    return who, facts


def served(job: manifests.Job, models: tuple[Any, Any], start: Any, adapter: Any, length: int) -> tuple[Any, dict]:
    """(vLLM with the adapter beside the base's weights, facts for the manifest). The models leave the card before it comes.

    Its path has no logits to measure by as the other paths are measured: what the adapter changes of log-probabilities of the
    held-out tokens is laid beside the same on peft's path, which is measured so.
    """
    import torch

    from workflow_scripts.generation import vllm_engine

    model, with_adapter = models
    if length > (most := getattr(model.config, "max_position_embeddings", length)):
        raise InputError(
            f"{job.out}: the longest prompt with its answer may have {length} tokens, the model knows {most} positions, and "
            "vLLM answers no further; lower max_new_tokens, or set generation.backend: graphs"
        )
    texts = [] if adapter is None else [ids for ids in adapter.data["distance"]["tokens"] if len(ids) > 1]
    theirs = changes(with_adapter, texts) if texts else []
    (with_adapter or model).to("cpu")
    torch.cuda.empty_cache()
    folder, rank = (None, 0) if adapter is None else (adapter.folder, with_adapter.peft_config["default"].r)
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[job.step["precision"]]
    room = max(length, 1 + max(map(len, texts), default=0))  # a text is asked for one more token
    who = vllm_engine.Engine(start.folder, folder, rank, dtype, room, job.config["generation"]["batch_size"])
    facts: dict = {"answered_by": f"vllm, {who.size} at a time"}
    if texts:
        ours = [a - b for a, b in zip(who.likely(texts, True), who.likely(texts, False), strict=True)]
        facts["distance_served"] = vllm_engine.agreement(ours, theirs)
    return who, facts


def changes(with_adapter: Any, texts: list[list[int]]) -> list[float]:
    """By how much the adapter changes the log-probability of each token but the first of each text, on peft's path."""
    from workflow_scripts.models import distance

    path, found = distance.Peft(with_adapter), []
    for ids in texts:
        trained, plain = (path.logits(ids, strength)[:-1].log_softmax(-1) for strength in (1.0, 0.0))
        found += [(trained - plain)[place, token].item() for place, token in enumerate(ids[1:])]
    return found


def main(job: manifests.Job) -> None:
    from workflow_scripts.plumbing.jsonl import write_jsonl

    parents = job.parents()
    prompts = parents["prompts"].rows()
    samples = samples_of(job.config)
    answers, facts = gather(job, len(prompts) * samples) or respond(job, parents, prompts)
    if "shard" in job.step:
        write_shard(job, parents, answers, facts)
        return
    with manifests.complete(job, "responses", parents) as draft:
        keys = ("response", "tokens", "finish_reason")  # in one order, wherever the answers come from
        asked = [(row, {"sample": n} if samples > 1 else {}) for row in prompts for n in range(samples)]
        rows = [
            {"key": row["key"], "prompt": row["prompt"], **which, **{key: made[key] for key in keys}}
            for (row, which), made in zip(asked, answers, strict=True)
        ]
        write_jsonl(draft.folder / job.out.name.replace(".manifest.json", ".jsonl"), rows)
        draft.manifest |= facts
        draft.run["tokens"] = sum(made["tokens"] for made in answers)


if __name__ == "__main__":
    cli.run(main, __doc__)
