"""What a step will take: memory of the host, time, disk. For schedulers; decides no number, and no step reads it.

One estimator for every rule, from the config alone (the base's shape, rows, lengths, batches, threads), so that every host plans
the same. Its constants were measured on two CPU cores and on one H100 (docs/performance.md has the tables) and are meant to be
right within a factor of two there. A job asks for the estimate times the config's `requests:`, and for more with each attempt.

    memory   the interpreter with its libraries, the weights once or more, and on a CPU what a micro-batch needs
    time     a start, then for each micro-batch and decoded token the greater part is the work of launching its layers; floating
             point operations on top: 2 a parameter and token forwards, 4 in training, since a frozen base has no weight gradients
    disk     what is written, and a copy of it while it is put in place
"""

import json
import math
from functools import cache, cached_property
from pathlib import Path

from workflow_scripts.config import own_tasks, sampled
from workflow_scripts.config.names import PAIRED
from workflow_scripts.plan.gpu_memory import Memory
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.gpus import WHOLE, share
from workflow_scripts.plumbing.messages import InputError

UNKNOWN = {
    "parameters": 1.5e9,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
}  # no shape given: as for 1.5 B
MB = 1e6
# Of an interpreter with the libraries of a step, in MB, and what CUDA's libraries add to it on the host.
LIBRARIES = {"slice": 250, "prompts": 130, "base": 700, "train": 750, "merge": 550, "generate": 550, "eval_rm": 700, "score": 500}
CUDA_LIBRARIES = {"slice": 600, "base": 500, "train": 1400, "merge": 500, "generate": 1300, "eval_rm": 1400}
FLOPS = {"cpu": 40e9, "cuda": 100e12}  # reached; of one thread, of the card
LAUNCH = {"cpu": 0.008, "cuda": 0.014}  # seconds for one layer, forwards and backwards, of one micro-batch
DECODE = {"cpu": 0.003, "cuda": 0.003}  # seconds for one layer, of one token of a whole batch, by transformers' generate
GRAPHS = {"cpu": 0.003, "cuda": 0.00015}  # the same by the generator's own steps
START = {"cpu": 5.0, "cuda": 20.0}  # seconds until a step computes
VLLM = 120.0  # until vLLM does: 118 with an adapter and cold caches, its import included (H200)
ASKED = {"mmlu": (120, 1), "truthfulqa": (190, 12)}  # task -> tokens of a question (or shot), passes for its options
# Of a task of `eval.tasks`: items, where no limit says how many; tokens of one; its options; tokens of an option.
ITEMS, ITEM, OPTIONS, OPTION = 2000, 220, 4, 128
FILLED = 0.4  # mean length of a row, as a share of the longest allowed
CHECKPOINTING = 1.4  # time of a step with activation checkpointing
RANK = 16  # of the adapters that were measured


class Estimates:
    """Estimates of a plan's steps. One for all seeds of an experiment."""

    def __init__(self, plan: Plan):
        self.plan, self.config = plan, plan.config
        self.device, self.threads = self.config.data["device"], self.config.data["threads"]
        self.shape = self._shape()
        self.parameters = self.shape["parameters"]
        self.requests = self.config.data["requests"]
        self.ask, self.gpu_mb = cache(self._ask), cache(self._gpu_mb)

    def _ask(self, kind: str, name: str, attempt: int) -> dict[str, int]:
        """mem_mb, runtime (minutes), disk_mb that a job asks for; name: a slice's, or a run's, and "" for the report."""
        of_slice = kind in ("slice", "samples")
        if not of_slice and name and name.partition(".")[0] not in self.config.experiments:
            name = self.config.view(name)[0]
        name = name.partition(".")[0] if of_slice else name
        name = name if of_slice or name in ("", *self.config.models) else self.config.run(name)[0]
        found = self.of(kind, name)
        return {
            "mem_mb": _up(attempt * self.requests["memory"] * found["memory_mb"], 100),
            "runtime": math.ceil(attempt * (self.requests["minutes"] + self.requests["time"] * found["seconds"] / 60)),
            "disk_mb": _up(self.requests["memory"] * found["disk_mb"], 100),
        }

    def _gpu_mb(self, kind: str, name: str) -> int:
        """MiB of a GPU that a step asks for beside others; a whole card's where nothing says of what shape its model is."""
        of_slice = kind in ("slice", "samples")
        experiment = (name if of_slice else self.config.view(name)[0]).partition(".")[0]
        if self.memory is None or experiment in self.config.models and experiment != "base":
            return WHOLE
        if kind.startswith(("generate_", "own_")) and self.config.generation()["backend"] == "vllm":
            return WHOLE  # it fills what it is given
        return math.ceil(share(self.memory.of(kind, experiment).peak) / 2**20)

    @cached_property
    def memory(self) -> Memory | None:
        """What each phase takes of a GPU; None where the base's shape is not known before it is made."""
        try:
            return Memory(self.config)
        except InputError:
            return None

    def of(self, kind: str, name: str) -> dict[str, float]:
        """memory_mb (of the host), seconds, disk_mb of a step; kind as plan/plan.py names it."""
        verb, _, task = kind.partition("_")
        if verb in ("generate", "score", "choice", "own"):
            return getattr(self, f"_{verb}")(task, name)
        return getattr(self, f"_{kind}")(name)

    # -- the base -----------------------------------------------------------------------------------------------------

    def _shape(self) -> dict[str, float]:
        """Parameters, width, layers and vocabulary: given, of the model that the config describes, or of the folder it names."""
        base = self.config.data["base"]
        found = dict(base.get("shape", {}))
        if not found and base["source"] == "scratch":
            found = base["scratch"]["model"] | {"vocab_size": base["scratch"]["tokenizer"]["vocab_size"]}
        elif not found and base["source"] == "path":
            found = json.loads((Path(base["path"]) / "config.json").read_text(encoding="utf-8"))
        if not {"hidden_size", "num_hidden_layers", "vocab_size"} <= set(found):
            return dict(UNKNOWN)
        if "parameters" not in found:
            wide, narrow = found["hidden_size"], found.get("intermediate_size", 4 * found["hidden_size"])
            found["parameters"] = found["num_hidden_layers"] * (4 * wide**2 + 3 * wide * narrow) + found["vocab_size"] * wide
        return {key: found[key] for key in UNKNOWN}

    def _libraries(self, kind: str, device: str | None = None) -> float:
        return LIBRARIES[kind] + (CUDA_LIBRARIES.get(kind, 0) if (device or self.device) == "cuda" else 0)

    def _compute(self, tokens: float, passes: float) -> float:
        """Seconds for the floating point operations; passes: operations for each parameter and token."""
        return tokens * passes * self.parameters / (FLOPS[self.device] * (self.threads if self.device == "cpu" else 1))

    def _batch_mb(self, tokens: float, training: bool) -> float:
        """MB of the host for a micro-batch of so many tokens: on a CPU only. In fp32, without flash attention."""
        if self.device == "cuda":
            return 0
        width, layers, vocabulary = (self.shape[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
        return tokens * ((140 * width * layers if training else 8 * width) + (16 if training else 4) * vocabulary) / MB

    def _kept_mb(self, answers: int, tokens: int) -> float:
        """MB of the host for keys and values: on a CPU only. In fp32, of a third of the width, since heads share them."""
        width, layers = self.shape["hidden_size"], self.shape["num_hidden_layers"]
        return 8 * layers * width / 3 * answers * tokens / MB if self.device == "cpu" else 0

    def _base(self, name: str) -> dict[str, float]:
        base = self.config.models[name]
        if base["source"] != "scratch":
            seconds = 15 + 1e-7 * self.parameters
            return {
                "memory_mb": self._libraries("base") + 10 * self.parameters / MB,
                "seconds": seconds,
                "disk_mb": 8 * self.parameters / MB,
            }
        train = base["scratch"]["train"]
        tokens = train["steps"] * train["batch"] * FILLED * train["max_length"]
        return {
            "memory_mb": self._libraries("base") + 16 * self.parameters / MB,
            "seconds": START["cpu"] + tokens * 6 * self.parameters / (FLOPS["cpu"] * self.threads),  # on the CPU
            "disk_mb": 8 * self.parameters / MB,
        }

    # -- light steps --------------------------------------------------------------------------------------------------

    def _slice(self, name: str) -> dict[str, float]:
        body = self.config.data["data"]["slices"][name]
        rows, trains = body["rows"], self.config.trains_on(name)
        if self.plan.is_sampled(name):
            return self._choose(name)
        kind = "slice" if trains or "composed" in body["source"] or "hub" in self.plan.rows_source(name) else "prompts"
        return {
            "memory_mb": self._libraries(kind) + 0.01 * rows,
            "seconds": (6 if trains and self.device == "cuda" else 1) + 0.001 * rows,
            "disk_mb": 0.02 * rows,
        }

    def _samples(self, name: str) -> dict[str, float]:
        """Answers to the prompts of a sampled slice."""
        asked, size = sampled.asking(self.config, name)[1], self.config.sampled_at_once()
        new, answers = asked["max_new_tokens"], math.ceil(asked["rows"] * asked["n"] / self.plan.sample_shards(name))
        at_once = min(size, answers)
        on_cpu = self._batch_mb(at_once, False) + self._kept_mb(at_once, new)
        decoding = self._decode(math.ceil(answers / at_once), answers, new, self.config.data["generation"]["rollouts"])
        return {
            "memory_mb": self._libraries("generate") + 6 * self.parameters / MB + on_cpu,
            "seconds": START[self.device] + decoding,
            "disk_mb": 0.01 * answers,
        }

    def _choose(self, name: str) -> dict[str, float]:
        """The choice among them: by a reward model a pass over each answer, else a verifier's look at it."""
        asked, models = sampled.asking(self.config, name)[1], self.plan.judges(name)
        answers = asked["rows"] * asked["n"]
        seconds, memory = START[self.device] + 0.002 * answers, self._libraries("train") + 0.02 * answers
        for train in (self.plan.experiment(model)["train"] for model in models):
            size, length = train["per_device_eval_batch_size"], FILLED * train["max_length"]
            seconds += self._forward(answers, size, length)
            memory += 4 * self.parameters / MB + self._batch_mb(size * length, False)
        return {"memory_mb": memory, "seconds": seconds, "disk_mb": 0.02 * answers}

    def _score(self, task: str, name: str) -> dict[str, float]:
        return {
            "memory_mb": self._libraries("score"),
            "seconds": 4 + 0.01 * self._prompts(task) * self._each(task),
            "disk_mb": 10,
        }

    def _select(self, name: str) -> dict[str, float]:
        """A copy of one adapter; scores are read."""
        larger = self.config.lora(name)["r"] / RANK * self.parameters / MB
        return {"memory_mb": self._libraries("prompts"), "seconds": 2, "disk_mb": 10 + larger}

    def _report(self, name: str) -> dict[str, float]:
        runs = len(self.config.experiments) * len(self.config.data["seeds"])
        return {"memory_mb": 150 + 2.5 * runs, "seconds": 2 + 0.05 * runs, "disk_mb": 10}

    def _merge(self, name: str) -> dict[str, float]:
        """Three models in fp32, one after the other, on the CPU."""
        return {
            "memory_mb": self._libraries("merge") + 10 * self.parameters / MB,
            "seconds": 5 + 9e-8 * self.parameters,
            "disk_mb": 8 * self.parameters / MB,
        }

    # -- answers and rewards ------------------------------------------------------------------------------------------

    def _prompts(self, task: str) -> int:
        return self.config.data["data"]["slices"][self.config.asked[task]]["rows"]

    def _decode(self, batches: float, rows: float, new_tokens: int, backend: str) -> float:
        """Seconds to decode so many batches of so many rows together."""
        step = (DECODE if backend == "hf" else GRAPHS)[self.device] * self.shape["num_hidden_layers"]
        start = VLLM if backend == "vllm" else 0.0
        return start + batches * new_tokens * step + self._compute(rows * new_tokens, 2)

    def _generate(self, task: str, name: str) -> dict[str, float]:
        prompts, shards = self._prompts(task) * self._each(task), self.plan.shards(task)
        new_tokens, size = self.config.task(task)["max_new_tokens"], self.config.at_once()
        batches, at_once = math.ceil(math.ceil(prompts / size) / shards), min(size, prompts)
        on_cpu = self._batch_mb(at_once, False) + self._kept_mb(at_once, new_tokens)
        return {
            "memory_mb": self._libraries("generate") + 6 * self.parameters / MB + on_cpu,
            "seconds": START[self.device]
            + self._decode(batches, batches * size, new_tokens, self.config.generation()["backend"]),
            "disk_mb": 0.01 * prompts,
        }

    def _each(self, task: str) -> int:
        return self.config.drawn(task).get("samples", 1)

    def _choice(self, task: str, name: str) -> dict[str, float]:
        """Multiple choice: a pass over each question, with its shots, for every option of more than one token."""
        body, (tokens, passes), prompts = self.config.data["eval"][task], ASKED[task], self._prompts(task)
        length = tokens * (1 + body.get("shots", 0))
        batch = 2 * min(body["batch_size"], prompts) * length  # logits and their logarithms
        return {
            "memory_mb": self._libraries("generate") + 6 * self.parameters / MB + self._batch_mb(batch, False) + 0.04 * prompts,
            "seconds": 2 * START[self.device] + self._forward(prompts * passes, body["batch_size"], length) + 0.01 * prompts,
            "disk_mb": 10,
        }

    def _own(self, task: str, name: str) -> dict[str, float]:
        """A task of `eval.tasks`, of which only its kind and its limit are known before its rows are read."""
        asked = self.config.own_tasks[task]["lm_eval"]
        items, length = asked["limit"] or ITEMS, ITEM * (1 + asked["num_fewshot"])
        if own_tasks.output_type(self.config, task) == "generate_until":
            size, new = self.config.at_once(), own_tasks.max_new_tokens(self.config, task)
            batches = math.ceil(items * self._each(task) / size)
            seconds = self._decode(batches, batches * size, new, self.config.generation()["backend"])
        else:
            size = min(self.config.data["eval"]["batch_size"], items)
            seconds = self._forward(items * OPTIONS, size, length)
        more = 0.0
        if self.device == "cpu":
            at_once = min(size, items * self._each(task))
            if own_tasks.output_type(self.config, task) == "generate_until":  # logits of one token of each answer
                more = self._batch_mb(at_once, False) + self._kept_mb(at_once, length + new)
            else:  # a pass over whole prompts, logits of the options alone, with their logarithms
                pairs, vocabulary = 2 * at_once, self.shape["vocab_size"]
                more = pairs * (8 * self.shape["hidden_size"] * length + 8 * OPTION * vocabulary) / MB
        if self.config.own_tasks[task].get("allow_code"):  # a process that judges, and room for what one answer may take
            more += self._libraries("generate") + 1024 * self.config.data["eval"]["sandbox"]["memory_gb"]
            seconds += START[self.device] + items * self._each(task)  # most end at once, some run for 3 to 30 seconds
        return {
            "memory_mb": self._libraries("generate") + 6 * self.parameters / MB + more + 0.05 * items,
            "seconds": 2 * START[self.device] + seconds + 0.01 * items,
            "disk_mb": 10 + 0.01 * items,
        }

    def _eval_rm(self, name: str) -> dict[str, float]:
        body = self.config.experiments[name]
        size, length = body["train"]["per_device_eval_batch_size"], body["train"]["max_length"]
        pairs = self.config.data["data"]["slices"][body["slice"]]["heldout"]
        return {
            "memory_mb": self._libraries("eval_rm") + 4 * self.parameters / MB + self._batch_mb(FILLED * size * length, False),
            "seconds": START[self.device] + self._forward(2 * pairs, size, FILLED * length),
            "disk_mb": 1,
        }

    def _judge(self, name: str) -> dict[str, float]:
        """Rewards of the answers to the judge's prompts."""
        evaluation = self.config.data["eval"]["judge"]
        train, rows = self.config.experiments[evaluation["reward"]]["train"], self._prompts("judge")
        size, length = train["per_device_eval_batch_size"], train["max_length"]
        return {
            "memory_mb": self._libraries("eval_rm") + 4 * self.parameters / MB + self._batch_mb(FILLED * size * length, False),
            "seconds": START[self.device] + self._forward(rows, size, FILLED * length),
            "disk_mb": 1,
        }

    # -- training -----------------------------------------------------------------------------------------------------

    def _forward(self, rows: float, size: int, length: float) -> float:
        """Seconds for forward passes over rows of a mean length."""
        launches = math.ceil(rows / size) * self.shape["num_hidden_layers"] * LAUNCH[self.device] / 3
        return launches + self._compute(rows * length, 2)

    def _train(self, name: str) -> dict[str, float]:
        body = self.config.experiments[name]
        train, rows = body["train"], self.config.data["data"]["slices"][body["slice"]]
        held, size = rows["heldout"], train["per_device_train_batch_size"]
        answers = train.get("num_generations", 1)
        copies = 2 if body["method"] in (*PAIRED, "kto") else 1  # sequences of a row
        length = FILLED * (train.get("max_length") or train["max_completion_length"])
        updates = train.get("num_iterations", 1)
        micro = math.ceil((rows["rows"] - held) * answers * updates * train.get("num_train_epochs", 1) / size)
        if body["method"] == "kto":
            micro *= 2  # a pair is two rows
        if train.get("max_steps", -1) > 0:
            micro = train["max_steps"] * train["gradient_accumulation_steps"]
        tokens = micro * size * length * (2 if body["method"] in PAIRED else 1)
        slow = CHECKPOINTING if train["gradient_checkpointing"] else 1.0
        ranks = self.config.gpus[name]  # share the micro-batches and the rollouts; each looks at the held-out rows
        computing = slow * (micro * self.shape["num_hidden_layers"] * LAUNCH[self.device] + self._compute(tokens, 4)) / ranks
        seconds = START[self.device] + computing
        judged = train["per_device_eval_batch_size"]
        if "reward" in body:
            new_tokens = train["max_completion_length"]
            each = train.get("steps_per_generation", train["gradient_accumulation_steps"])  # micro-batches of a rollout
            rollouts = math.ceil(micro / (each * updates))
            backend = self.config.data["generation"]["rollouts"]
            seconds += self._decode(rollouts, rollouts * each * size / ranks, new_tokens, backend)
            seconds += 2 * self._decode(math.ceil(held / judged), held, new_tokens, backend)
        else:
            seconds += 2 * self._forward(copies * held, judged, length)
        if train.get("precompute_ref_log_probs"):
            seconds += (2 if body["method"] == "kto" else 1) * self._forward(copies * rows["rows"], judged, length)
        # An adapter is a few per cent of the base: on disk twice with the optimiser's state, in memory with its gradients too.
        larger = max(0.0, self.config.lora(name)["r"] / RANK - 1) * self.parameters / MB
        widest = max(size * (2 if body["method"] in PAIRED else 1), judged / 2)
        return {
            "memory_mb": ranks
            * (self._libraries("train") + 4 * self.parameters / MB + 0.6 * larger + self._batch_mb(widest * length, True)),
            "seconds": seconds,
            "disk_mb": 10 + self.parameters / MB + larger,
        }


def _up(value: float, step: int) -> int:
    return step * math.ceil(value / step)
