"""Compare our mathematics of PPO with that of TRL 1.12, the last release with a PPO trainer, on the same random rollouts.

TRL's formulas stand in the middle of `PPOTrainer.train`. Its source is read at run time, the statements are found by the names
that they assign, and they run unchanged on our tensors. Both sides get the same tokens, log-probabilities, values and scores.
What is compared, and how the one-token shift is allowed for, stands in docs/ppo-parity.md.

TRL 1.12 needs an environment of its own, since the pipeline's has a later TRL. In the repository's root:

    python3.11 -m venv parity
    grep -E '^(torch|transformers|accelerate|datasets|pandas)==' envs/requirements.lock | xargs parity/bin/pip install trl==1.12.0
    PYTHONPATH=. parity/bin/python measurements/ppo_parity.py

Prints the largest absolute differences. Exit status 1 if one is above 1e-5.
"""

import ast
import inspect
import sys
import textwrap
from dataclasses import fields
from itertools import product
from types import CodeType, SimpleNamespace

import torch
import trl
from torch import Tensor
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from workflow_scripts.rl import advantages as ours

TOLERANCE, SEEDS = 1e-5, range(5)
ANSWERS, TOKENS, MINI_BATCH = 16, 53, 8
PAD, EOS, FIRST_WORD = 0, 1, 2
GAMMA_LAMBDA = ((1.0, 0.95), (0.99, 0.9), (1.0, 1.0))
NO_PADDING, LONGER_MASK, OWN_MASK = "no padding", "padded, mask + 1 token", "padded, own mask"
QUANTITIES = ("rewards", "advantages", "returns", "whitened", "pg loss", "pg grad", "vf loss", "vf grad", "vf clipped")


def statements(first: str, last: str) -> CodeType:
    """The part of TRL's `train` from the first statement that assigns `first` to the last that assigns `last` in one body."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(PPOTrainer.train)))):
        body = node.body if isinstance(getattr(node, "body", None), list) else []
        names = [{t.id for t in s.targets if isinstance(t, ast.Name)} if isinstance(s, ast.Assign) else set() for s in body]
        starts, ends = ([i for i, found in enumerate(names) if name in found] for name in (first, last))
        if starts and ends and starts[0] <= ends[-1]:
            return compile(ast.Module(body[starts[0] : ends[-1] + 1], type_ignores=[]), inspect.getfile(PPOTrainer), "exec")
    raise RuntimeError(f"TRL {trl.__version__}: PPOTrainer.train has no body that assigns `{first}` and then `{last}`")


def random_rollout(seed: int, dtype: torch.dtype, padded: bool) -> SimpleNamespace:
    """What sampling and a step's forward passes would give. Behind the answers stand arbitrary numbers, which must not count."""
    torch.manual_seed(seed)
    lengths = torch.full((ANSWERS,), TOKENS)
    if padded:
        lengths[3:] = torch.randint(2, TOKENS, (ANSWERS - 3,))
        lengths[1], lengths[2] = TOKENS - 1, 1  # the edge cases; answer 0 fills the width
    index = torch.arange(TOKENS)
    ids = torch.randint(FIRST_WORD, 99, (ANSWERS, TOKENS))
    ids = torch.where(index == lengths[:, None] - 1, EOS, ids).where(index < lengths[:, None], PAD)
    noise = torch.randn(5, ANSWERS, TOKENS, dtype=torch.float64).to(dtype)
    logps = -2 * noise[0].abs()
    return SimpleNamespace(
        ids=ids,
        lengths=lengths,
        mask=(index < lengths[:, None]).float(),
        longer_mask=(index <= lengths[:, None]).float(),
        logps=logps,
        ref_logps=logps + 0.5 * noise[1],
        values=noise[2],
        scores=2 * torch.randn(ANSWERS, dtype=torch.float64).to(dtype),
        new_logps=(logps + 0.3 * noise[3]).requires_grad_(),
        new_values=(noise[2] + 0.3 * noise[4]).requires_grad_(),
        rows=torch.randperm(ANSWERS)[:MINI_BATCH],
    )


def with_gradients(policy_loss: Tensor, value_loss: Tensor, r: SimpleNamespace) -> dict[str, Tensor]:
    (policy,), (value,) = torch.autograd.grad(policy_loss, r.new_logps), torch.autograd.grad(value_loss, r.new_values)
    return {"pg loss": policy_loss.detach(), "pg grad": policy, "vf loss": value_loss.detach(), "vf grad": value}


def of_trl(r: SimpleNamespace, args: SimpleNamespace) -> dict[str, Tensor]:
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    space = vars(ppo_trainer) | {"args": args, "self": SimpleNamespace(args=args, processing_class=tokenizer)}
    space |= dict.fromkeys(("responses", "postprocessed_response", "postprocessed_responses"), r.ids)
    space |= {"processing_class": tokenizer, "scores": r.scores.clone(), "values": r.values}
    space |= {"logprobs": r.logps, "ref_logprobs": r.ref_logps}
    exec(statements("sequence_length", "sequence_length"), space)
    space["sequence_lengths"] = space["sequence_length"]
    exec(statements("contain_eos_token", "returns"), space)
    found = {"rewards": space["rewards"], "advantages": space["advantages"], "returns": space["returns"]}
    exec(statements("returns", "advantages"), space)  # whitens them
    assert torch.equal(~space["padding_mask"], r.mask.bool()) and torch.equal(~space["padding_mask_p1"], r.longer_mask.bool())

    # The two model calls of a step give the rollout's tensors instead, with one position more, which TRL cuts off.
    predicted = torch.nn.functional.pad(r.new_values[r.rows], (0, 1))[..., None]
    output = SimpleNamespace(logits=torch.zeros(MINI_BATCH, TOKENS + 1, 1))
    space |= {"forward": lambda *_: (output, predicted), "selective_log_softmax": lambda *_: r.new_logps[r.rows]}
    space |= {"model": None, "query_responses": r.ids, "context_length": 1, "micro_batch_inds": r.rows}
    exec(statements("mb_advantage", "pg_loss"), space)
    found |= {"whitened": space["advantages"], "vf clipped": space["vf_clipfrac"]}
    return found | with_gradients(space["pg_loss"], space["vf_loss"], r)


def of_us(r: SimpleNamespace, args: SimpleNamespace, mask: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """`mask`: of rewards and values. The policy trains on the answers' own tokens in any case, as in TRL."""
    ref_logps = r.ref_logps.where(r.mask.bool(), r.logps)  # no KL is paid at the token that the mask may be longer by
    rewards = ours.token_rewards(scores, r.logps, ref_logps, mask, args.kl_coef)
    if args.whiten_rewards:
        rewards = ours.whiten(rewards, mask, shift_mean=False)
    raw, returns = ours.gae(rewards, r.values, mask, args.gamma, args.lam)
    whitened, some = ours.whiten(raw, r.mask), r.rows
    ratio, a = torch.exp(r.new_logps[some] - r.logps[some]), whitened[some]
    clipped = torch.clamp(ratio, 1 - args.cliprange, 1 + args.cliprange)
    policy_loss = ours.masked_mean(torch.max(-a * ratio, -a * clipped), r.mask[some])
    losses = ours.value_loss(r.new_values[some], r.values[some], returns[some], mask[some], args.cliprange_value)
    found = {"rewards": rewards, "advantages": raw, "returns": returns, "whitened": whitened, "vf clipped": losses[1]}
    return found | with_gradients(policy_loss, losses[0], r)


def compare(kind: str, dtype: torch.dtype, seed: int, args: SimpleNamespace) -> dict[str, float]:
    """The largest absolute difference of each quantity; under `no allowance`, of the advantages when the shift is ignored."""
    r = random_rollout(seed, dtype, padded=kind != NO_PADDING)
    theirs = of_trl(r, args)
    if kind != OWN_MASK:
        same = of_us(r, args, r.longer_mask, r.scores)  # without padding the two masks are one
        return {name: (theirs[name] - same[name]).abs().max().item() for name in QUANTITIES}
    # TRL's extra step, seen from the last token, is worth gamma (V + lam (score - V)), V being the value behind that token.
    behind = r.values[torch.arange(ANSWERS), r.lengths.clamp(max=TOKENS - 1)]
    folded = args.gamma * (behind + args.lam * (r.scores - behind))
    same = of_us(r, args, r.mask, torch.where(r.lengths < TOKENS, folded, r.scores))
    found = {name: ((theirs[name] - same[name]) * r.mask).abs().max().item() for name in ("advantages", "returns", "whitened")}
    found |= {name: (theirs[name] - same[name]).abs().max().item() for name in ("pg loss", "pg grad")}
    plain = of_us(r, args, r.mask, r.scores)
    return found | {"no allowance": ((theirs["advantages"] - plain["advantages"]) * r.mask).abs().max().item()}


def main() -> int:
    torch.set_num_threads(1)
    defaults = {f.name: f.default for f in fields(PPOConfig)}
    print(f"TRL {trl.__version__}, torch {torch.__version__}; TRL's defaults:", end=" ")
    print({name: defaults[name] for name in ("kl_coef", "kl_estimator", "cliprange", "cliprange_value", "missing_eos_penalty")})
    columns, worst = (*QUANTITIES, "no allowance"), 0.0
    print(f"{'rollout':24}{'values':9}{'gamma':>6}{'lam':>6}" + "".join(f"{name:>13}" for name in columns))
    for kind, dtype, (gamma, lam) in product((NO_PADDING, LONGER_MASK, OWN_MASK), (torch.float32, torch.float64), GAMMA_LAMBDA):
        found = []
        for seed, whiten_rewards in product(SEEDS, (False,) if kind == OWN_MASK else (False, True)):
            args = SimpleNamespace(**defaults | {"gamma": gamma, "lam": lam, "whiten_rewards": whiten_rewards})
            found.append(compare(kind, dtype, seed, args))
        largest = {name: torch.tensor([one[name] for one in found]).max().item() for name in found[0]}  # NaN stays NaN
        numbers = "".join(f"{largest[name]:13.1e}" if name in largest else f"{'-':>13}" for name in columns)
        print(f"{kind:24}{str(dtype)[6:]:9}{gamma:6}{lam:6}{numbers}")
        worst = torch.tensor([worst, *(largest[name] for name in QUANTITIES if name in largest)]).max().item()
    print(f"largest difference {worst:.1e}, allowed {TOLERANCE:.0e} (`no allowance` does not count)")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
