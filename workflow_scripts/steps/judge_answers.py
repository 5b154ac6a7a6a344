"""Let a reward model judge a run's answers to prompts that nothing was trained on: one reward for each.

All runs are judged by one reward model, so rewards compare; the report makes win rates of them. A reward model stands in for
people, and badly where a policy was trained against it: what it likes then grows without the answers getting better (Gao et al.
2023, arXiv:2210.10760). So nothing here is a verdict.

The reward is that of the conversation with the answer at its end, read as in training (`rl/reward_model.py`). An answer that was
cut off gets the reward of what is there.

    python -m workflow_scripts.steps.judge_answers --step results/judge_dpo.json --out trial/judge_dpo.json \\
        --inputs results/dpo/judge_responses.manifest.json results/data/judge.manifest.json \\
        results/sft_v2/merged/manifest.json results/rm/adapter/manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli


def main(job: manifests.Job) -> None:
    from workflow_scripts.data import slicing
    from workflow_scripts.evaluation.scores import mean_stderr
    from workflow_scripts.models import device
    from workflow_scripts.plumbing.progress import Progress
    from workflow_scripts.rl import reward_model

    config, step, parents = job.config, job.step, job.parents()
    prompts, given = parents["prompts"].rows(), {row["key"]: row for row in parents["responses"].rows()}
    device.prepare(step, job.deterministic)
    model, tokenizer = reward_model.load(
        parents["start"], parents["adapter"], job.work, step["device"], step["precision"], config.get("quant")
    )
    talks = [[*slicing.prompt_turns(row), {"role": "assistant", "content": given[row["key"]]["response"]}] for row in prompts]
    bar = Progress(len(talks), f"rewards of {job.out.stem}")
    rewards: list[float] = []
    for first in range(0, len(talks), config["batch_size"]):
        batch = talks[first : first + config["batch_size"]]
        rewards += reward_model.score(model, tokenizer, batch, config["batch_size"], config["max_length"])
        bar.step(len(rewards))
    bar.close()

    mean, stderr = mean_stderr([[reward] for reward in rewards])
    reasons = [given[row["key"]]["finish_reason"] for row in prompts]
    print(
        f"{job.out}: mean reward {mean:.3f}" + (f" +- {stderr:.3f}" if stderr is not None else "") + f", {len(rewards)} prompts"
    )
    with manifests.complete(job, "scores", parents) as draft:
        draft.manifest |= {
            "n_prompts": len(rewards),
            "mean_reward": mean,
            "mean_reward_stderr": stderr,
            "truncated_share": sum(reason == "length" for reason in reasons) / len(reasons),
            "mean_response_tokens": sum(given[row["key"]]["tokens"] for row in prompts) / len(prompts),
            "per_prompt": [{"key": row["key"], "reward": round(reward, 6)} for row, reward in zip(prompts, rewards, strict=True)],
        }


if __name__ == "__main__":
    cli.run(main, __doc__)
