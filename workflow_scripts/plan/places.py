"""Where the artifacts of a config lie: the paths that the rules declare, by the names of runs, slices and tasks.

Names of runs: `base` or another model, an experiment (seed 1), or an experiment with `.seedN`. What is judged may be a
view of one, such as `sft_v2_merged` (config/names.py).
"""

import math

from workflow_scripts.config.config import Config


class Places:
    """The files of each artifact, its manifest first."""

    def __init__(self, config: Config):
        self.config = config
        self.results: str = config.data.get("pathvars", {}).get("results", "results")

    @property
    def work(self) -> str:
        """Locks, staging and finished copies, by fingerprint."""
        return f"{self.results}/.work"

    def slice_inputs(self, name: str) -> list[str]:
        return [f"{self.results}/data/{name}.manifest.json", f"{self.results}/data/{name}.jsonl"]

    def slice_of(self, run: str) -> str:
        """The slice that a run trains on: one that a run makes is of a seed, `best_of_8.seed2`."""
        experiment, seed = self.config.run(run)
        return self.of_seed(self.config.experiments[experiment]["slice"], seed)

    def of_seed(self, name: str, seed: int) -> str:
        return f"{name}.seed{seed}" if seed != 1 and self.is_sampled(name) else name

    def is_sampled(self, name: str) -> bool:
        """Whether the rows of a slice are made by a run of the config (config/sampled.py)."""
        return "sampled" in self.config.slice_body(name)["source"]

    def samples_inputs(self, name: str) -> list[str]:
        """The answers that a sampled slice of a seed has of its own."""
        return [f"{self.results}/data/{name}.answers{ending}" for ending in (".manifest.json", ".jsonl")]

    def base_inputs(self, name: str = "base") -> list[str]:
        """Files of a model that is not trained here."""
        return [f"{self.results}/{name}/manifest.json", f"{self.results}/{name}/model.safetensors"]

    def adapter_inputs(self, run: str) -> list[str]:
        return [f"{self.results}/{run}/adapter/{name}" for name in ("manifest.json", "adapter_model.safetensors")]

    def answers_inputs(self, task: str, run: str) -> list[str]:
        return [f"{self.results}/{run}/{task}_responses{ending}" for ending in (".manifest.json", ".jsonl")]

    def shards(self, task: str) -> int:
        """Jobs that share the answering of a task's prompts: as many as the config says, and no more than there are prompts (for
        `hf`, batches; for `vllm`, chunks)."""
        rows = self.config.data["data"]["slices"][self.config.asked[task]]["rows"]
        return min(self.config.data["eval"]["shards"], math.ceil(rows / self.config.generation().get("batch_size", 1)))

    def shard_files(self, task: str, run: str) -> list[str]:
        """The answers of each shard, where there are several."""
        count = self.shards(task)
        return [f"{self.results}/{run}/{task}_shards/{n}of{count}.json" for n in range(1, count + 1)] if count > 1 else []

    def results_of(self, run: str) -> list[str]:
        """The files that tell how good a run is: its scores, or for a reward model how well it tells answers apart."""
        if self.is_reward_model(run):
            return [f"{self.results}/{run}/rm_eval.json"]
        return [f"{self.results}/{task}_{run}.json" for task in self.config.scored]

    def is_reward_model(self, run: str) -> bool:
        return run not in self.config.models and self.experiment(run)["method"] == "rm"

    def experiment(self, run: str) -> dict:
        return self.config.experiments[self.config.run(run)[0]]
