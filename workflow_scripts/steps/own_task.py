"""Put a task of `eval.tasks` to a model and score it, by lm-eval's prompts, filters and metrics (evaluation/own_tasks.py).

The model is the one that answers every other prompt: an adapter beside the weights that it was trained on, these in
`eval.precision`; answers come from the same generator (steps/generate.py), log-likelihoods from the runner of MMLU. Both are one
step: the scores, with the answers under `per_prompt`, are what it writes. Where answers are programs (`allow_code`), a process of
its own judges them, without network (evaluation/judge_code.py).

    python -m workflow_scripts.steps.own_task --step results/arc_easy_dpo.json --out trial/arc_easy_dpo.json \\
        --inputs results/sft_v2/merged/manifest.json results/dpo/adapter/manifest.json data/arc_easy.jsonl
"""

from functools import partial
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.evaluation import samples
from workflow_scripts.steps import cli, generate, scoring


def main(job: manifests.Job) -> None:
    from workflow_scripts.evaluation import judge_code, lm_tasks, own_tasks, sandbox
    from workflow_scripts.models import chat, device, distance, loading

    config, step, parents = job.config, job.step, job.parents()
    if config.get("allow_code"):
        sandbox.check()
    start, adapter, quant = parents["start"], parents.get("adapter"), config.get("quant")
    device.prepare(step, job.deterministic)
    kept = job.work / fingerprint(step)
    kept.mkdir(parents=True, exist_ok=True)
    manager, tasks = own_tasks.load(config, job.inputs, kept / "rows")
    models = loading.evaluated(start, adapter, job.work, step["device"], step["precision"], quant)
    model, with_adapter = models
    tokenizer = chat.tokenizer_of(start)
    facts: dict[str, Any] = {"unpinned": True} if "revision" not in config["lm_eval"].get("hub", {"revision": ""}) else {}
    if "generation" in config:
        chat.decode_as_declared(model, tokenizer, config["decoding"])
        say = partial(_say, job, models, (start, adapter), tokenizer, facts)
        lm = own_tasks.answering(model, tokenizer, say, generate.samples_of(config))
    else:
        if adapter is not None:
            facts["distance"] = loading.check(distance.Peft(with_adapter), adapter, step["precision"], quant)
        lm = lm_tasks.runner(model, tokenizer, config["batch_size"], job.out.stem)
    if config.get("allow_code"):
        own_tasks.ask(lm, manager, tasks, config)
        scores = judge_code.judge(config, job.inputs, tasks, lm, kept)
    else:
        found = own_tasks.evaluate(lm, manager, tasks, config)
        cut = lm.cut if isinstance(lm.cut, int) else sum(one["arguments"][0][0] in lm.cut for one in found[0])
        scores = own_tasks.score(config, tasks, found, getattr(lm, "answers", []), cut)
    print(table(scores))
    with manifests.complete(job, "scores", parents) as draft:
        draft.manifest |= scores | facts


def _say(
    job: manifests.Job, models: tuple[Any, Any], parts: tuple[Any, Any], tokenizer: Any, facts: dict,
    texts: list[str], ids: list[list[int]], new: int,
) -> list[dict]:  # fmt: skip
    """The generator's answers; notes in `facts` who answered, and that the adapter does on that path what it did in training."""
    from workflow_scripts.models import chat

    who, found = generate.who_answers(job, models, parts, ids, new, generate.samples_of(job.config), tokenizer)
    facts |= found
    saved = job.work / fingerprint(job.step) / "answers.jsonl"
    asked = generate.asked_of(job.config, tuple(chat.ends(tokenizer, models[0])), new)
    return generate.answer(who, tokenizer, asked, texts, ids, f"answers of {job.out.stem}", saved)


def table(scores: dict) -> str:
    """The metric that counts, then the others."""
    lines = [scoring.line(scores, scores["metric"], scores["n_prompts"], "items"), *filter(None, [samples.table(scores)])]
    if scores.get("stopped"):
        why = ", ".join(f"{count} by {reason}" for reason, count in scores["stopped"].items())
        lines.append(f"judgements that the sandbox stopped, which count as 0: {why}")
    return "\n".join([*lines, *(f"{name:<24}{value:7.4f}" for name, value in scores["other"].items())])


if __name__ == "__main__":
    cli.run(main, __doc__)
