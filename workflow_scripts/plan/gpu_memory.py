"""Peak memory on the GPU of each phase of a plan, from the config alone: before a card is taken. Reads nothing, imports no torch.

What is estimated is `torch.cuda.max_memory_allocated`, in bytes, for the longest rows that the config lets through. What a card
must have besides (the CUDA context, what the allocator holds without using it) is a reserve of its own: `need`.
docs/performance.md has the estimates beside what was measured. No factor was fitted: each constant is a count of tensors, and a
test holds those that a layer keeps against autograd's own. The gradients in flight (`Pass.backward`) are reasoned.

Symbols: L layers, h hidden size, q = heads x head size, k = key/value heads x head size, m intermediate size, v vocabulary, r
LoRA's rank, e bytes of the compute dtype (2 in bf16 and fp16), t = tokens of a micro-batch, padded to its longest row of s
tokens.

    weights       NF4: 0.5 bytes for each weight of the layers' linear modules, and for each block of 64 a constant: 4 bytes, or
                  with double quantisation 1 byte and 4/256 (Dettmers et al. 2023, arXiv:2305.14314, section 3): 0.516 together.
                  The embeddings, the LM head (bitsandbytes leaves it out), norms and biases are in e bytes, and so is all without
                  NF4
    adapters      sum of r (in + out) over the targeted modules of all layers. 16 bytes each when trained: fp32 weight, gradient
                  and two moments of AdamW; 4 when frozen. Paged moments count: a step has them on the card
    activations   of a layer, as in Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1), but (1) SDPA keeps no score matrix:
                  query, key, value, output and a log-sum-exp; with padding also the mask, e s bytes a token, and keys and values
                  repeated for each head; (2) a frozen linear module keeps no input, a LoRA module keeps its own: after dropout,
                  with a mask of one byte; (3) RMSNorm keeps an fp32 copy of the residual; (4) SwiGLU keeps gate, activation and
                  up
    checkpointing each layer's input, e h a token and layer, and the activations of the one layer that is recomputed (ibid.,
                  section 5)
    LM head       TRL 1.16 scores in tiles of 4,096 tokens x 32,768 logits, forwards and backwards, in SFT, DPO, KTO, GRPO, RLOO
                  and PPO alike (trl/kernels/chunked_logprob.py): never the logits of a batch. A reward model has no LM head
    generation    the KV cache, 2 L k e a token; the prefill's activations of one layer; the last token's logits in e and twice in
                  fp32
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workflow_scripts.config.config import Config
from workflow_scripts.config.experiments import VERIFIERS, rewards
from workflow_scripts.config.names import CHOICE
from workflow_scripts.plumbing.messages import InputError

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TILE = (4096, 32768)  # tokens x logits that TRL's LM head holds at once
DROPOUT_MASK = 1  # bytes of an element of the mask that CUDA's dropout keeps
EVAL_PROMPT = 512  # tokens of the longest prompt of IFEval or GSM8K with its template, which no key of the config bounds
OPTIONS = 128  # tokens of a batch's rows that get logits in multiple choice: an option's, and what rows differ in length
# Beside what torch allocates: the context with the kernels of torch, cuBLAS and bitsandbytes (nvidia-smi shows 0.3 to 0.6 GiB
# more than torch reserves), and a tenth of the peak that the allocator holds in pieces that fit nothing.
CONTEXT = 0.6 * GIB
FRAGMENTATION = 1.1
CARDS = (16, 24, 40, 80, 141)  # GB, powers of ten, as cards are named: a T4 has a little less than 16 GiB
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # modules that read what another one reads
KEYS = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def need(peak: float) -> float:
    """Bytes that a card must have for a peak of so many allocated bytes."""
    return FRAGMENTATION * peak + CONTEXT


def fits(peak: float, card: float) -> bool:
    """Whether a peak fits on a card of so many GB."""
    return need(peak) <= card * 1e9


@dataclass(frozen=True)
class Shape:
    """Of a decoder with grouped-query attention and a gated MLP (Llama, Qwen2, Mistral and their kin)."""

    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    query: int  # width of all query heads together
    key: int  # of all key heads
    heads: int
    tied: bool  # the LM head is the embedding
    parameters: int = 0

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Linear module of a layer -> (in, out)."""
        h, q, k, m = self.hidden, self.query, self.key, self.intermediate
        attention = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, m), "up_proj": (h, m), "down_proj": (m, h)}

    @property
    def linear(self) -> int:
        """Weights of the layers' linear modules: what NF4 quantises."""
        return self.layers * sum(a * b for a, b in self.modules.values())

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden


def shape_of(config: Config) -> Shape:
    """The base's shape: of `base.shape`, of the model that the config describes, or of the folder that it names.

    InputError, naming the key, if something is missing or does not add up.
    """
    base = config.data["base"]
    found: dict[str, Any] = dict(base.get("shape", {}))
    place = ["base", "shape"]
    if not found and base["source"] == "scratch":
        found = base["scratch"]["model"] | {"vocab_size": base["scratch"]["tokenizer"]["vocab_size"], "tie_word_embeddings": True}
    elif not found and base["source"] == "path":
        found, place = _of_folder(Path(base["path"])), ["base", "path"]
    missing = [key for key in (*KEYS, "tie_word_embeddings") if key not in found]
    if missing:
        raise config.fail(
            place, f"{', '.join(missing)}: missing, and what fits on a GPU follows from it; copy it from config.json"
        )
    head = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    shape = Shape(
        hidden=found["hidden_size"], layers=found["num_hidden_layers"], vocabulary=found["vocab_size"],
        intermediate=found["intermediate_size"], heads=found["num_attention_heads"], tied=found["tie_word_embeddings"],
        query=head * found["num_attention_heads"], key=head * found["num_key_value_heads"],
    )  # fmt: skip
    least = shape.linear + shape.embedding * (1 if shape.tied else 2) + (2 * shape.layers + 1) * shape.hidden
    parameters = found.get("parameters", least)
    if not least <= parameters <= 1.02 * least:  # biases are all that may come on top
        problem = f"parameters: found {parameters:,}, but layers and embeddings of this shape have {least:,}"
        problem += "; is tie_word_embeddings right?"
        raise config.fail(place, problem)
    return Shape(**{**shape.__dict__, "parameters": parameters})


def _of_folder(folder: Path) -> dict[str, Any]:
    """The keys of a model folder's config.json, with its parameters as its safetensors files list them."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, Any] = {}
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as opened:
                tensors |= json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: config.json or *.safetensors cannot be read ({error}); name a model folder in base.path"
        ) from None
    sizes = [one["shape"] for name, one in tensors.items() if name != "__metadata__"]
    found["parameters"] = sum(_product(size) for size in sizes)
    return found | {"tie_word_embeddings": "lm_head.weight" not in tensors}


def _product(numbers: list[int]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product


def lora_parameters(shape: Shape, block: dict) -> int:
    """Trainable parameters of one adapter: a module with in x out weights has r x in and out x r.

    InputError for a target whose size is not known.
    """
    if unknown := sorted(set(block["target_modules"]) - set(shape.modules)):
        raise InputError(
            f"lora.target_modules: {', '.join(unknown)}: of no known size; without the model only {', '.join(shape.modules)} are"
        )
    return shape.layers * block["r"] * sum(sum(shape.modules[name]) for name in block["target_modules"])


def weights(shape: Shape, e: int, nf4: bool, double: bool, head: bool = True) -> float:
    """Bytes of the frozen base; `head`: with its LM head."""
    rest = shape.parameters - shape.linear - (0 if head or shape.tied else shape.embedding)
    return shape.linear * ((0.5 + (1 + 4 / 256 if double else 4) / 64) if nf4 else e) + rest * e


@dataclass(frozen=True)
class Pass:
    """How a layer computes. copies: its LoRA modules make fp32 copies of their inputs, as peft does on an unquantised base and,
    outside autocast, on a 4-bit one as well; autocast: what the copies come down to is of the compute dtype again."""

    shape: Shape
    targets: tuple[str, ...]
    rank: int
    e: int
    dropout: bool
    copies: bool
    autocast: bool = True
    masked: bool = True  # rows of different lengths

    def kept(self, tokens: float, row: float, mask_byte: int = DROPOUT_MASK) -> float:
        """Bytes that one layer keeps for its backward pass."""
        shape, e = self.shape, self.e
        input_bytes = e if self.autocast or not self.copies else 4
        each: float = 2 * (4 * shape.hidden + 4)  # two norms: an fp32 residual and a scale
        each += 2 * e * shape.query + 4 * shape.heads  # query, output, log-sum-exp
        each += 2 * e * (shape.query if self.masked else shape.key) + (e * row if self.masked else 0)
        each += 3 * e * shape.intermediate  # gate, activation, up
        seen = {"o_proj"}  # its input, the attention's output, is kept already
        for name in self.targets:
            width = shape.modules[name][0]
            if self.dropout:
                each += (input_bytes + mask_byte) * width
            elif self.copies and e < 4:
                each += input_bytes * width
            elif (shared := SHARED.get(name, name)) not in seen:
                each += e * width
                seen.add(shared)
            each += (4 if input_bytes == 4 else e) * self.rank
        return tokens * each

    def backward(self, tokens: float) -> float:
        """Bytes in flight in a layer's backward: of the MLP's width, the gradient that arrives and the one that is made (where
        inputs were copied: one in fp32, its cast, and the frozen module's); those of the residual; a dequantised weight."""
        wide = 4 + 2 * self.e if self.copies and self.e < 4 else 2 * self.e
        largest = max(a * b for a, b in self.shape.modules.values())
        return tokens * (wide * self.shape.intermediate + 2 * self.e * self.shape.hidden) + self.e * largest

    def forward(self, tokens: float, row: float) -> float:
        """Bytes of a layer's forward without gradients: gate, activation, up and product, with an fp32 copy where copies are
        made; the residual twice; the mask, as booleans and for the kernel."""
        wide = 4 * self.e + (4 if self.copies and self.e < 4 else 0)
        return tokens * (wide * self.shape.intermediate + (2 * self.e + 4) * self.shape.hidden + (1 + self.e) * row)


def lm_head(shape: Shape, e: int, tokens: float, training: bool) -> float:
    """Bytes of TRL's LM head over so many tokens: a tile of logits, the hidden states, and in training their gradient in fp32."""
    tile = e * min(tokens, TILE[0]) * TILE[1]
    return tile + tokens * shape.hidden * (e + (4 + e if training else 0))


def step(how: Pass, tokens: float, row: float, checkpointing: bool, head_tokens: float) -> float:
    """Bytes of a micro-batch: what is kept of the forward pass, and the larger of the LM head's work and a layer's backward.

    head_tokens: that get a logit; 0 for a model without an LM head.
    """
    shape = how.shape
    mask = tokens * row if how.masked else 0  # booleans, once for all layers
    scored = (
        lm_head(shape, how.e, head_tokens, True) if head_tokens else 0
    ) + 4 * shape.hidden * tokens  # and the last norm's copy
    if checkpointing:
        inputs = (shape.layers + 1) * how.e * shape.hidden * tokens
        return mask + inputs + max(scored, how.kept(tokens, row) + how.backward(tokens))
    return mask + shape.layers * how.kept(tokens, row) + max(scored, how.backward(tokens))


def cache(shape: Shape, e: int, rows: float, length: float) -> float:
    """Bytes of the keys and values of so many rows, and a layer's again, which grow by being copied."""
    return 2 * (shape.layers + 1) * shape.key * e * rows * length


def decoding(how: Pass, rows: float, prompt: float, new: float) -> float:
    """Bytes of generating `new` tokens for rows of prompts together: the prefill, or the last token with the whole cache."""
    logits = rows * how.shape.vocabulary * (how.e + 4 + 4)
    prefill = cache(how.shape, how.e, rows, prompt) + how.forward(rows * prompt, prompt)
    return max(prefill, cache(how.shape, how.e, rows, prompt + new)) + logits


@dataclass
class Phase:
    """One line of the answer. stages: what is done one after the other -> its peak in bytes."""

    kind: str  # train, generate, choose, eval_rm
    name: str  # an experiment; a task
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
            found.append(self.train(name, body))
            if body["method"] == "rm":
                found.append(self.eval_rm(name, body))
        for task in self.config.evaluations:
            found.append(self.choose(task) if task in CHOICE else self.generate(task, self.config.data["eval"]["batch_size"]))
        return found

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

    def _base(self, body: dict, head: bool = True) -> float:
        return weights(self.shape, self.e, body["quantise"] != "none", self.double, head)

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
        fixed = self._base(body, head=method != "rm") + 16 * trainable + low * adapter
        phase = Phase("train", name, trainable=trainable)
        if "reward" in body:
            self._sampled(phase, body, fixed)
        else:
            self._supervised(phase, body, fixed)
        return phase

    def _supervised(self, phase: Phase, body: dict, fixed: float) -> None:
        train, method, how = body["train"], body["method"], self._pass(body)
        row, size, judged = train["max_length"], train["per_device_train_batch_size"], train["per_device_eval_batch_size"]
        sides = 2 if method in ("dpo", "rm") else 1  # chosen and rejected in one batch
        tokens, eval_tokens = sides * size * row, (2 if method == "dpo" else 1) * judged * row
        phase.stages["step"] = fixed + step(how, tokens, row, train["gradient_checkpointing"], 0 if method == "rm" else tokens)
        held = how.forward(eval_tokens, row) + (0 if method == "rm" else lm_head(self.shape, self.e, eval_tokens, False))
        phase.stages["objective"] = fixed + held

    def _sampled(self, phase: Phase, body: dict, fixed: float) -> None:
        train, method = body["train"], body["method"]
        size, prompt, new = train["per_device_train_batch_size"], self.prompt(body), train["max_completion_length"]
        row = prompt + new
        rollout = size * train.get("steps_per_generation", train["gradient_accumulation_steps"])
        fixed += self._reward_models(body)
        policy, plain = self._pass(body), self._pass(body, copies=True, autocast=False)
        checkpointing = train["gradient_checkpointing"]
        # Generation and what of PPO runs the decoder itself are outside autocast: their LoRA modules compute in fp32.
        phase.stages["step"] = fixed + step(policy, size * row, row, checkpointing, size * new)
        if method == "ppo":
            phase.stages["value step"] = fixed + step(plain, size * row, row, checkpointing, 0)
        phase.stages["rollout"] = fixed + decoding(plain, max(rollout, train["per_device_eval_batch_size"]), prompt, new)
        for model in self._models(body):  # rl/rewards.learned: all answers of a rollout in one forward pass
            length = min(row, self.config.experiments[model]["train"]["max_length"])
            phase.stages["rewards"] = fixed + plain.forward(rollout * length, length)

    def _models(self, body: dict) -> list[str]:
        return [name for name in rewards(body) if name not in VERIFIERS]

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
        """Answers to a task: the base with its adapter is merged in fp32 on the card, cast, and then answers."""
        evaluation = self.config.data["eval"]
        how, merging = self._merged()
        rows = min(rows, self.config.data["data"]["slices"][self.config.evaluations[task]]["rows"])
        answering = how.e * self.shape.parameters + decoding(how, rows, EVAL_PROMPT, evaluation[task]["max_new_tokens"])
        return Phase("generate", task, {"merge in fp32": merging, "answers": answering})

    def choose(self, task: str, row: int = 0, tail: int = OPTIONS) -> Phase:
        """Multiple choice. row: tokens of the longest prompt, with its examples; tail: tokens of each row that get logits.

        lm-eval keeps those logits, their log-softmax in fp32 and that of the batch before; torch makes an fp32 copy of bf16.
        """
        how, merging = self._merged()
        body = self.config.data["eval"][task]
        row = row or EVAL_PROMPT * (1 + body.get("shots", 0))
        rows = min(body["batch_size"], self.config.data["data"]["slices"][body["prompts"]]["rows"])
        each = how.e + 4 + 4 + (4 if self.config.data["eval"]["precision"] == "bf16" else 0)
        logits = rows * tail * self.shape.vocabulary * each
        asked = how.e * self.shape.parameters + max(how.forward(rows * row, row), logits)
        return Phase("choose", task, {"merge in fp32": merging, "options": asked})

    def _merged(self) -> tuple[Pass, float]:
        """(passes of the merged model, bytes that merging takes on the card: all weights in fp32, and of one module its change
        and a copy, or of the embedding, which is the first to be cast, what it is cast to)."""
        e, largest = BYTES[self.config.data["eval"]["precision"]], max(a * b for a, b in self.shape.modules.values())
        more = max(4 * 2 * largest, e * self.shape.embedding if e < 4 else 0)
        return Pass(self.shape, (), 0, e, dropout=False, copies=False), 4 * (self.shape.parameters + self.adapter) + more
