"""From a checked config to the steps: for each artifact its path, its parents, and the JSON that decides its outcome.

The Snakefile asks this module, and nothing else, what a rule's parameter and inputs are. Runs at parse time, without heavy
imports. Where artifacts lie: plan/places.py; what depends on what: plan/graph.py; what decides an outcome: plan/steps.py.
"""

import json

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config import comparison
from workflow_scripts.config.config import Config
from workflow_scripts.config.names import answered
from workflow_scripts.plan.graph import Graph
from workflow_scripts.plan.steps import Steps


class Plan(Graph):
    """The steps of one config, each made once."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._steps = Steps(self, self.fingerprint)
        self._texts: dict[tuple[str, str], str] = {}
        self._fingerprints: dict[tuple[str, str], str] = {}

    def base(self, name: str) -> str:
        return self._text("base", name)

    def targets(self) -> list[str]:
        """The files that people ask for: results, adapters, slices."""
        found = [file for run in [*self.config.models, *self.shown()] for file in self.results_of(run)]
        found += [self.adapter_inputs(run)[0] for run in self.runs()]
        slices = [name for name in self.config.data["data"]["slices"] if not self.is_sampled(name)]
        return found + [self.slice_inputs(name)[0] for name in [*slices, *self.sampled_slices(self.config.data["seeds"])]]

    def slice(self, name: str) -> str:
        return self._text("slice", name)

    def samples(self, name: str) -> str:
        return self._text("samples", name)

    def limits(self) -> dict[str, list[dict]]:
        """Slice -> the limits of each experiment that takes only rows which are whole, as data/fitting.py takes them."""
        found: dict[str, dict[tuple[int, float], list[str]]] = {}
        for name, body in self.config.experiments.items():
            if "max_left_out" in body and name not in {*self.config.trials, *self.config.tuned}:  # of the same rows
                limits = (body["train"]["max_length"], body["max_left_out"])
                found.setdefault(body["slice"], {}).setdefault(limits, []).append(name)
        return {
            slice_: [
                {
                    "max_length": length,
                    "max_left_out": share,
                    "place": f"{self.results}/data/{slice_}.jsonl",
                    "user": ", ".join(users),
                }
                for (length, share), users in asked.items()
            ]
            for slice_, asked in found.items()
        }

    def train(self, run: str) -> str:
        return self._text("train", run)

    def merge(self, run: str) -> str:
        return self._text("merge", run)

    def generate(self, task: str, run: str) -> str:
        return self._text(f"generate_{task}", run)

    def shard(self, task: str, run: str, number: int) -> str:
        """The step of one shard: that of all answers, which it is a part of, and which part."""
        step = self.step(f"generate_{task}", run)
        return fingerprint.canonical(step | {"shard": [number, self.shards(task)]})

    def sample_shard(self, name: str, number: int) -> str:
        """The same, of the answers of a sampled slice."""
        return fingerprint.canonical(self.step("samples", name) | {"shard": [number, self.sample_shards(name)]})

    def score(self, task: str, run: str) -> str:
        return self._text(f"score_{task}", run)

    def eval_rm(self, run: str) -> str:
        return self._text("eval_rm", run)

    def report(self) -> str:
        return self._text("report", "")

    def check(self) -> None:
        """Resolve every step of the config once (seed 1), so that what can't be planned is said at once."""
        comparison.check(self.config)
        wanted, most = self.config.data["eval"]["shards"], max(map(self.shards, answered(self.config.asked)))
        if wanted > most:
            parts, key = {"hf": ("batches", ", or eval.batch_size"), "vllm": ("chunks", ", or generation.chunk")}.get(
                self.config.generation()["backend"], ("prompts", "")
            )
            raise self.config.fail(["eval", "shards"], f"found {wanted}, but there are {most} {parts} at most; lower it{key}")
        for name in self.config.data["data"]["slices"]:
            self._text("slice", name)
        for name in [*self.config.models, *self.config.experiments]:
            for kind in ["eval_rm"] if self.is_reward_model(name) else [f"score_{task}" for task in self.config.scored]:
                self._text(kind, name)

    def _text(self, kind: str, name: str) -> str:
        """What is kept of a step: its dict takes several times the memory."""
        key = (kind, name)
        if key not in self._texts:
            self._texts[key] = fingerprint.canonical(self._steps.make(kind, name))
        return self._texts[key]

    def fingerprint(self, kind: str, name: str) -> str:
        key = (kind, name)
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint.of_text(self._text(kind, name))
        return self._fingerprints[key]

    def step(self, kind: str, name: str) -> dict:
        """The step as it was first planned, whatever has changed on disk since."""
        return json.loads(self._text(kind, name))
