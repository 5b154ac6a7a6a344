"""Put the questions of MMLU or TruthfulQA to a model: how likely is each option? By lm-eval's own tasks (evaluation/lm_tasks.py).

The model is the one that answers prompts: an adapter beside the weights that it was trained on, these in `eval.precision`.
Nothing is answered in text, so there is no second step: the scores are what this one writes.

    python -m workflow_scripts.steps.lm_eval_task --step results/mmlu_dpo.json --out trial/mmlu_dpo.json \\
        --inputs results/sft_v2/merged/manifest.json results/dpo/adapter/manifest.json results/data/mmlu.manifest.json \\
        results/data/mmlu_dev.manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli, scoring


def main(job: manifests.Job) -> None:
    from workflow_scripts.evaluation import lm_tasks
    from workflow_scripts.models import chat, device, distance, loading

    config, step, parents = job.config, job.step, job.parents()
    start, questions = parents["start"], parents["prompts"].rows()
    device.prepare(step, job.deterministic)
    index = lm_tasks.manager()
    group_of = lm_tasks.groups(index)
    if config["task"] == "mmlu":
        solved = parents["fewshot"].rows() if "fewshot" in parents else []
        files = str(parents["prompts"].path), str(parents["fewshot"].path) if solved else ""
        lm_tasks.check_subjects(questions, solved, config["shots"], group_of, files)
        tasks = lm_tasks.mmlu(index, questions, solved)
    else:
        tasks = lm_tasks.truthfulqa(index, questions)
    adapter, quant = parents.get("adapter"), config.get("quant")
    model, with_adapter = loading.evaluated(start, adapter, job.work, step["device"], step["precision"], quant)
    does = adapter and loading.check(distance.Peft(with_adapter), adapter, step["precision"], quant)
    lm = lm_tasks.runner(model, chat.tokenizer_of(start), config["batch_size"], job.out.stem)
    scores = lm_tasks.score(config, questions, lm_tasks.evaluate(lm, index, tasks, config), group_of, lm.cut)
    print(table(scores))
    with manifests.complete(job, "scores", parents) as draft:
        draft.manifest |= scores | ({"distance": does} if does else {})


def table(scores: dict) -> str:
    """A line for each metric and group of subjects; then what makes the numbers doubtful."""
    lines = [scoring.line(scores, metric, scores["n_prompts"], "questions") for metric in ("acc", "mc2") if metric in scores]
    for name, part in scores.get("by_group", {}).items():
        lines.append(scoring.line({name: part["acc"], f"{name}_stderr": part["acc_stderr"]}, name, part["n"], "questions"))
    for what, count in (("with a tie", scores["tied"]), ("cut at its beginning", scores["cut"])):
        lines.append(f"{what:<24}{100 * count / scores['n_prompts']:7.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, __doc__)
