"""What a forward and a backward pass of a base with adapters take on a GPU, in bytes: of a layer, the LM head, and generation.

No factor was fitted: each constant is a count of tensors, and a test holds those that a layer keeps against autograd's own. The
gradients in flight (`Pass.backward`) are reasoned. Symbols as in plan/shape.py, and t = tokens of a micro-batch, padded to its
longest row of s tokens.

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

from dataclasses import dataclass

from workflow_scripts.generation.answers import PREFILL
from workflow_scripts.plan.shape import Shape

TILE = (4096, 32768)  # tokens x logits that TRL's LM head holds at once
DROPOUT_MASK = 1  # bytes of an element of the mask that CUDA's dropout keeps
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # modules that read what another one reads


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


def in_slots(how: Pass, slots: int, length: float, sampled: bool, rank: int, rows: int) -> float:
    """Bytes of the backend `graphs` (generation/graphs.py) beside the model: the cache of its slots, the adapter joined to the
    weights, logits of a step's rows (what warms up and what is captured hold their own, and a draw its scores in fp32), a
    prefill, cuBLAS's room.
    """
    shape, e = how.shape, how.e
    whole = -(-length // 64) * 64
    kept = 2 * shape.layers * shape.key * e * (slots + 1) * whole
    h, q, k, m = shape.hidden, shape.query, shape.key, shape.intermediate
    joined = e * shape.layers * rank * (3 * (q + 2 * k) + 2 * h + 4 * m + 5 * h + q + m)  # `up`, block diagonal, and A
    logits = rows * shape.vocabulary * (3 * e + (4 if sampled else 0))
    return kept + joined + logits + how.forward(PREFILL, 0) + 64 * 2**20
