"""Rewards that say nothing of an answer, as controls: what a method gains by one, it does not gain by its reward.

Random rewards raise some models (Shao et al. 2025, arXiv:2506.10947: Qwen2.5-Math nearly as much as right ones do, Llama and OLMo
not; by their account the clipped ratio favours what a model does anyway). A method has to beat itself with a placebo.

- `random`: a coin, 0 or 1, for each answer. It is a hash of the run's seed, the step at which the answer was drawn, the prompt's
  id and the answer's place among those to its prompt: so a resumed training tosses what it would have tossed.
- `shuffled`: the rewards of a batch, dealt anew. All orders are as likely, so an answer may keep its own; were that excluded,
  an answer's own reward would speak against it. The scale and the spread of the real reward stay.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

Reward = Callable[..., list[float | None]]  # (prompts, completions, **columns of the rows) -> one number for each completion


def coins(seed: int) -> Reward:
    def judge(prompts: list, completions: list, id: list, trainer_state: Any, **columns: Any) -> list[float | None]:
        before: Counter = Counter()
        found: list[float | None] = []
        for one in id:
            text = f"coin/{seed}/{trainer_state.global_step}/{one}/{before[one]}"
            found.append(float(hashlib.sha256(text.encode()).digest()[0] & 1))
            before[one] += 1
        return found

    return judge


def shuffled(reward: Reward, seed: int) -> Reward:
    def judge(prompts: list, completions: list, id: list, trainer_state: Any, **columns: Any) -> list[float | None]:
        own = reward(prompts, completions, id=id, trainer_state=trainer_state, **columns)
        return random.Random(f"shuffled/{seed}/{trainer_state.global_step}/{id}").sample(own, len(own))

    return judge
