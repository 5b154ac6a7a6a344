"""Peak memory on the GPU of each phase of a plan, from the config alone: before a card is taken. Imports no torch.

What is estimated is `torch.cuda.max_memory_allocated`, in bytes, for the longest rows that the config lets through. What a card
must have besides (the CUDA context, what the allocator holds without using it) is a reserve of its own: `need`.
docs/performance.md has the estimates beside what was measured. The formulas are those of plan/shape.py (weights, adapters) and
plan/passes.py (activations, the LM head, generation).
"""

from dataclasses import dataclass, field
from typing import Any

from workflow_scripts.config import own_tasks, sampled
from workflow_scripts.config.config import Config
from workflow_scripts.config.experiments import rewards
from workflow_scripts.config.names import CHOICE, PAIRED
from workflow_scripts.data.unpaired import kl_rows
from workflow_scripts.generation.answers import ROWS, rows_for
from workflow_scripts.plan.passes import Pass, decoding, in_slots, lm_head, step
from workflow_scripts.plan.shape import lora_parameters, shape_of, weights
from workflow_scripts.plumbing.gpus import need

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
EVAL_PROMPT = 512  # tokens of the longest prompt of IFEval or GSM8K with its template, which no key of the config bounds
OPTIONS = 128  # tokens of a batch's rows that get logits in multiple choice: an option's, and what rows differ in length
GATHERED = 3  # layers that are whole at a time, of a base in parts
CARDS = (16, 24, 40, 80, 141)  # GB, powers of ten, as cards are named: a T4 has a little less than 16 GiB


def fits(peak: float, card: float) -> bool:
    """Whether a peak fits on a card of so many GB."""
    return need(peak) <= card * 1e9


@dataclass
class Phase:
    """One line of the answer. stages: what is done one after the other -> its peak in bytes."""

    kind: str  # train, generate, sample, choose, eval_rm
    name: str  # an experiment; a task; a slice
    stages: dict[str, float] = field(default_factory=dict)
    trainable: int = 0

    @property
    def peak(self) -> float:
        return max(self.stages.values())

    @property
    def stage(self) -> str:
        return max(self.stages, key=lambda name: self.stages[name])


class Memory:
    """The phases of a config on a GPU."""

    def __init__(self, config: Config):
        self.config, self.shape = config, shape_of(config)
        self.block, self.double = config.data["lora"], config.data["quant"]["double"]
        self.adapter = lora_parameters(self.shape, self.block)
        self.e = BYTES[config.data["precision"]]

    def phases(self) -> list[Phase]:
        """Trainings, evaluations of reward models, and answers to each task. A merge runs on the CPU."""
        found = []
        for name, body in self.config.experiments.items():
            if name in self.config.tuned:  # a copy of an adapter; a reward model is judged as the one that it was
                continue
            phase, original = self.train(name, body), self.config.trials.get(name, name)
            if phase.peak == self.train(original, self.config.experiments[original]).peak and name != original:
                continue  # a trial at another rate is nothing new
            found.append(phase)
            if body["method"] == "rm":
                found.append(self.eval_rm(name, body))
        for task in self.config.asked:
            found.append(self.choose(task) if task in CHOICE else self.generate(task, self.config.at_once()))
        for name, body in self.config.data["data"]["slices"].items():
            if "run" in body["source"].get("sampled", {}):
                found.append(self.samples(name, self.config.sampled_at_once()))
        return found + [self.own(task) for task in self.config.own_tasks]

    def of(self, kind: str, name: str) -> Phase:
        """The phase of a step, as plan/plan.py names kinds; name: an experiment's, or a model's that is only scored."""
        verb, _, task = kind.partition("_")
        if kind in ("train", "eval_rm"):
            body = self.config.experiments[name]
            return self.train(name, body) if kind == "train" else self.eval_rm(name, body)
        if kind == "samples":
            return self.samples(name, self.config.sampled_at_once())
        if kind == "slice":
            return self.choose_rows(name)
        if kind == "judge":
            model = self.config.data["eval"]["judge"]["reward"]
            return self.eval_rm(model, self.config.experiments[model])
        if verb == "own":
            return self.own(task)
        return self.choose(task) if verb == "choice" else self.generate(task, self.config.at_once())

    def _block(self, body: dict) -> dict:
        """The LoRA block of an experiment: the global one, but for copies of a rank sweep."""
        return body.get("lora", self.block)

    def adapter_of(self, body: dict) -> int:
        return lora_parameters(self.shape, self._block(body))

    def _pass(self, body: dict, **more: Any) -> Pass:
        """A training's own: under autocast, with the block's dropout unless the method samples."""
        block = self._block(body)
        dropout = "reward" not in body and block["dropout"] > 0
        settings: dict[str, Any] = {"dropout": dropout, "copies": body["quantise"] == "none"} | more
        return Pass(self.shape, tuple(block["target_modules"]), block["r"], self.e, **settings)

    def _base(self, body: dict, head: bool = True, trains: bool = False) -> float:
        """Bytes of the base's weights; one that `trains` is dequantised first, where the config says so."""
        in_4_bit = body["quantise"] != "none" and not (trains and self._dequantised)
        return weights(self.shape, self.e, in_4_bit, self.double, head)

    def _in_parts(self, base: float, parts: int) -> float:
        """Bytes on each card of a base in 16 or 32 bits whose layers lie on so many: its part, and three layers while they are
        gathered, the one that computes and the next, which arrives in one piece and is cut into its weights."""
        layers = self.e * self.shape.linear
        return base if parts == 1 else base - layers + layers / parts + GATHERED * layers / self.shape.layers

    @property
    def _dequantised(self) -> bool:
        return self.config.data["device"] == "cuda" and self.config.data["speed"]["dequantised"]

    def prompt(self, body: dict) -> int:
        """Tokens of the longest prompt that the slice of an experiment lets through; `max_prompt_tokens` in the body: what if."""
        data = self.config.data["data"]
        whole = data["slices"][body["slice"]].get("max_prompt_tokens", data["max_prompt_tokens"])
        return body.get("max_prompt_tokens", whole)

    def train(self, name: str, body: dict) -> Phase:
        """body: the experiment, resolved; another than the config's answers "what if"."""
        method = body["method"]
        adapter = self.adapter_of(body)
        trainable = adapter + (self.shape.hidden if method == "rm" else 0)
        if method == "ppo":
            trainable += adapter + self.shape.hidden + 1
        low = self.e if self.e < 4 else 0  # autocast's copies of the adapter
        base = self._in_parts(self._base(body, head=method != "rm", trains=True), body.get("parts", self.config.parts[name]))
        fixed = base + 16 * trainable + low * adapter
        phase = Phase("train", name, trainable=trainable)
        if "reward" in body:
            self._sampled(phase, body, fixed)
        else:
            self._supervised(phase, body, fixed)
        return phase

    def _supervised(self, phase: Phase, body: dict, fixed: float) -> None:
        train, method, how = body["train"], body["method"], self._pass(body)
        row, size, judged = train["max_length"], train["per_device_train_batch_size"], train["per_device_eval_batch_size"]
        judged = max(judged, kl_rows(body)) if method == "kto" else judged  # whole groups
        sides = 2 if method in PAIRED else 1  # chosen and rejected in one batch
        tokens, eval_tokens = sides * size * row, (1 if method == "rm" else sides) * judged * row
        phase.stages["step"] = fixed + step(how, tokens, row, train["gradient_checkpointing"], 0 if method == "rm" else tokens)
        held = how.forward(eval_tokens, row) + (0 if method == "rm" else lm_head(self.shape, self.e, eval_tokens, False))
        phase.stages["objective"] = fixed + held

    def _sampled(self, phase: Phase, body: dict, fixed: float) -> None:
        train, method = body["train"], body["method"]
        size, prompt, new = train["per_device_train_batch_size"], self.prompt(body), train["max_completion_length"]
        row = prompt + new
        rollout = size * train.get("steps_per_generation", train["gradient_accumulation_steps"])
        fixed += self._reward_models(body)
        before, policy, plain = fixed, self._pass(body), self._pass(body, copies=True, autocast=False)
        checkpointing = train["gradient_checkpointing"]
        # Generation and what of PPO runs the decoder itself are outside autocast: their LoRA modules compute in fp32.
        phase.stages["step"] = fixed + step(policy, size * row, row, checkpointing, size * new)
        if method == "ppo":
            phase.stages["value step"] = fixed + step(plain, size * row, row, checkpointing, 0)
        drawn = max(rollout, train["per_device_eval_batch_size"])
        if self.config.data["generation"]["rollouts"] == "graphs":
            again = body["quantise"] != "none" and not self._dequantised  # a 4-bit base is there a second time
            lines = rows_for(rollout)
            slots = min(drawn, self.config.data["generation"]["slots"], lines)
            fixed += again * self.e * self.shape.linear
            fixed += in_slots(policy, slots, row, True, self._block(body)["r"], lines)
            phase.stages |= {stage: peak + fixed - before for stage, peak in phase.stages.items()}
            phase.stages["rollout"] = fixed
        else:
            phase.stages["rollout"] = fixed + decoding(plain, drawn, prompt, new)
        for model in self._models(body):  # rl/rewards.learned: all answers of a rollout in one forward pass
            length = min(row, self.config.experiments[model]["train"]["max_length"])
            phase.stages["rewards"] = fixed + plain.forward(rollout * length, length)

    def _models(self, body: dict) -> list[str]:
        return [name for name in rewards(body) if name in self.config.experiments]

    def _reward_models(self, body: dict) -> float:
        """Bytes of the reward models: an adapter each on PPO's backbone, else a model each beside the policy."""
        if body["method"] == "ppo":
            return 4 * (self.adapter_of(body) + self.shape.hidden) * len(self._models(body))
        bodies = [self.config.experiments[name] for name in self._models(body)]
        return sum(self._base(one, head=False) + 4 * self.adapter_of(one) for one in bodies)

    def eval_rm(self, name: str, body: dict) -> Phase:
        row, rows = body["train"]["max_length"], body["train"]["per_device_eval_batch_size"]
        how = self._pass(body, copies=True, autocast=False)
        peak = self._base(body, head=False) + 4 * self.adapter_of(body) + how.forward(rows * row, row)
        return Phase("eval_rm", name, {"scoring": peak})

    def generate(self, task: str, rows: int) -> Phase:
        """Answers to a task, so many at once: by the base with its adapter beside it."""
        prompts = self.config.data["data"]["slices"][self.config.asked[task]]["rows"]
        rows = min(rows, prompts * self.config.drawn(task).get("samples", 1))
        return self._answers(task, rows, EVAL_PROMPT, self.config.task(task)["max_new_tokens"])

    def samples(self, name: str, rows: int) -> Phase:
        """Answers of a sampled slice, so many at once. It is judged as evaluations judge it, in the trainings' precision."""
        asked, data = sampled.asking(self.config, name)[1], self.config.data
        rows, slices = min(rows, asked["rows"] * asked["n"]), data["data"]["slices"]
        prompt = slices[asked["prompts"]].get("max_prompt_tokens", data["data"]["max_prompt_tokens"])
        return self._answers(name, rows, prompt, asked["max_new_tokens"], "sample")

    def choose_rows(self, name: str) -> Phase:
        """The reward models by which a sampled slice is chosen: one after the other, and all there."""
        models = self._models(sampled.block(self.config, name))
        peaks = [self.eval_rm(model, self.config.experiments[model]).peak for model in models]
        return Phase("eval_rm", name, {"scoring": sum(peaks)})

    def _answers(self, task: str, rows: int, prompt: int, new: int, kind: str = "generate") -> Phase:
        how, fixed = self._judged()
        backend = self.config.data["generation"]["rollouts"] if kind == "sample" else self.config.generation()["backend"]
        if backend == "graphs":
            ranks = [self._block(body)["r"] for body in self.config.experiments.values()]
            answering = fixed + in_slots(how, rows, prompt + new, kind == "sample", max(ranks), ROWS)
        elif backend == "vllm":  # it fills what it is given with keys and values; one answer has to fit
            answering = fixed + decoding(how, 1, prompt, new)
        else:
            answering = fixed + decoding(how, rows, prompt, new)
        return Phase(kind, task, {"answers": answering})

    def choose(self, task: str, row: int = 0, tail: int = OPTIONS) -> Phase:
        """Multiple choice. row: tokens of the longest prompt, with its examples; tail: tokens of each row that get logits.

        lm-eval keeps those logits, their log-softmax in fp32 and that of the batch before; torch makes an fp32 copy of bf16.
        """
        body = self.config.data["eval"][task]
        rows = min(body["batch_size"], self.config.data["data"]["slices"][body["prompts"]]["rows"])
        return self._options(task, rows, row or EVAL_PROMPT * (1 + body.get("shots", 0)), tail)

    def own(self, task: str) -> Phase:
        """A task of `eval.tasks`: answers, or the logits of what a model may say."""
        asked = self.config.own_tasks[task]["lm_eval"]
        prompt, limit = EVAL_PROMPT * (1 + asked["num_fewshot"]), asked["limit"] or self.config.at_once()
        if own_tasks.output_type(self.config, task) == "generate_until":
            answers = limit * self.config.drawn(task).get("samples", 1)
            return self._answers(task, min(self.config.at_once(), answers), prompt, own_tasks.max_new_tokens(self.config, task))
        return self._options(task, self.config.data["eval"]["batch_size"], prompt, OPTIONS)

    def _options(self, task: str, rows: int, row: int, tail: int) -> Phase:
        how, fixed = self._judged()
        each = how.e + 4 + 4 + (4 if self.config.data["eval"]["precision"] == "bf16" else 0)
        logits = rows * tail * self.shape.vocabulary * each
        asked = fixed + max(how.forward(rows * row, row), logits)
        return Phase("choose", task, {"options": asked})

    def _judged(self) -> tuple[Pass, float]:
        """(passes of the model that is judged, bytes of its weights): the base in full precision, and the largest adapter in
        fp32. Where all are judged on what they trained on, those in 4-bit take less."""
        e = BYTES[self.config.data["eval"]["precision"]]
        how = Pass(
            self.shape, tuple(self.block["target_modules"]), self.block["r"], e, dropout=False, copies=True, autocast=False
        )
        adapters = [self.adapter_of(body) for body in self.config.experiments.values()]
        return how, e * self.shape.parameters + 4 * max(adapters)
