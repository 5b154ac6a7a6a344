"""IFEval scores of responses that were generated before (Zhou et al. 2023, arXiv:2311.07911), offline and reproducible.

The verdicts are lm-eval's own (`lm_eval.tasks.ifeval`). What is ours around them:
- NLTK's Punkt tables are shipped. lm-eval looks for them at import and downloads them where they are missing. NLTK reads no data
  that another account could write: no checkout under umask 0002, of another owner, or with hard links. That is off here: the
  tables are as trusted as the code beside them, and nothing else is read.
- Python's `random` is seeded from the prompt's key before each verdict. The reference replaces a letter that is not a-z
  by a random one (in IFEval: keys 1122 and 1129), and draws whatever a prompt leaves open, so its verdicts on such rows
  change from run to run. Strict and loose see the same draw; in the reference they may see two, and loose can fail
  where strict passes.
- `langdetect`, random by default, is seeded with 0.
- NLTK's wall-clock limit of 5 s on each regular expression is off: a busy machine must not decide a verdict.
- Standard errors at the instruction level, which lm-eval does not give.
"""

import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workflow_scripts.evaluation import samples
from workflow_scripts.evaluation.scores import answer, check_rows, entries, joined, label, mean_stderr, optional
from workflow_scripts.plumbing import startup
from workflow_scripts.plumbing.messages import InputError

_TOKENIZERS = Path(__file__).parent / "nltk_data/tokenizers"
_KINDS = ("strict", "loose")


@contextmanager
def conditions() -> Iterator[None]:
    """NLTK and langdetect as above, for as long as the block lasts: for lm-eval's checkers, whichever task runs them.

    All that is changed is global to the process, so it is put back at the end: NLTK's search path (not NLTK_DATA, which
    NLTK reads only once, at import), the state of `random`, langdetect's seed, NLTK's time limit and distrust, and the checkers'
    logger, which is silenced because it prints each response whose language it cannot tell.
    """
    if not (_TOKENIZERS / "punkt_tab" / "english").is_dir():
        raise InputError(f"{_TOKENIZERS}/punkt_tab/english: not found; it belongs to this package, install it again")
    import langdetect
    import nltk.data
    import nltk.pathsec
    import nltk.redos

    logger = logging.getLogger("lm_eval.tasks.ifeval.instructions")
    factory, limits, trust = langdetect.DetectorFactory, nltk.redos, nltk.pathsec
    before = (random.getstate(), list(nltk.data.path), factory.seed, limits.DEFAULT_TIMEOUT, trust.ENFORCE, logger.disabled)
    try:
        nltk.data.path.insert(0, str(_TOKENIZERS.parent))
        factory.seed, limits.DEFAULT_TIMEOUT, trust.ENFORCE, logger.disabled = 0, None, False, True
        yield
    finally:
        state, nltk.data.path[:], factory.seed, limits.DEFAULT_TIMEOUT, trust.ENFORCE, logger.disabled = before
        random.setstate(state)


@contextmanager
def reference() -> Iterator[Any]:
    """lm-eval's module `lm_eval.tasks.ifeval.utils`, for as long as the block lasts under these conditions.

    The first call in a process imports lm-eval's task package and NLTK: 1.5 to 2 s, no torch, no network.
    """
    with conditions():
        from lm_eval.tasks.ifeval import utils

        startup.ready()
        yield utils


def verdicts(utils: Any, prompt: dict, response: str, kinds: tuple[str, ...] = _KINDS) -> dict[str, list[bool]]:
    """{"strict": [...], "loose": [...]}: one verdict for each instruction of a prompt. Call it inside `reference()`.

    kinds: the verdicts to give; strict alone takes an eighth of the time of both, since loose tries eight variants.

    Instructions are judged one at a time, because one checker can raise: `json` gives up on a response that opens
    thousands of brackets (a degenerate model's "[[[[..."), and lm-eval with it. Such a response is no valid JSON: not
    followed.
    """
    key = prompt.get("key")
    seed = prompt["prompt"] if key is None else key
    checks = {"strict": utils.test_instruction_following_strict, "loose": utils.test_instruction_following_loose}
    found: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for identifier, kwargs in zip(prompt["instruction_id_list"], prompt["kwargs"], strict=True):
        example = utils.InputExample(key, [identifier], prompt["prompt"], [kwargs])
        for kind in kinds:
            random.seed(seed)  # an int, or a str, which `random` hashes with SHA-512: the same in every process
            try:
                found[kind].append(checks[kind](example, response).follow_all_instructions)
            except RecursionError:
                found[kind].append(False)
    return found


def score(
    prompts: list[dict],
    responses: list[dict],
    strip_think: bool,
    prompts_name: str = "prompts",
    responses_name: str = "responses",
) -> dict:
    """Scores of the responses to each prompt: one, or as many to every prompt.

    prompts: rows of IFEval's `input_data.jsonl`: prompt, instruction_id_list, kwargs (one dict for each instruction)
    and, normally, key. responses: rows with prompt and response (text; "" fails everything) and optionally key,
    finish_reason and tokens (a count), the last two in all rows or in none. strip_think: judge `answer(response)`.
    Rows are joined by key where every row of both has one, else by the prompt's text. Order means nothing.

    Returns the four accuracies (shares, 0 to 1), each with `<metric>_stderr` (None for a single prompt);
    by_instruction: {id: n, strict_acc, loose_acc, strict_acc_stderr, loose_acc_stderr}; n_prompts; n_instructions;
    truncated_share (finish_reason "length") and mean_response_tokens, None where not given; strip_think; reworded_keys:
    keys whose response row has another prompt text than the prompts (joined by key all the same; IFEval's key 2785 has
    two wordings); per_prompt, in the order of `prompts`. With several responses to a prompt (`sample` tells them apart) the
    accuracies are means over all of them, with errors clustered by prompt; an entry of per_prompt has its lists of verdicts as
    lists and `value`, the share of answers that follow all; and there are samples and pass_at, of that verdict
    (evaluation/samples.py). Raises InputError; the names say in it which file is meant.
    """
    check_rows(prompts, prompts_name, ("prompt",))
    check_rows(responses, responses_name, ("prompt", "response"))
    answers = joined(prompts, responses, prompts_name, responses_name)
    flat = [one for each in answers for one in each]
    reasons = optional(flat, "finish_reason", str, responses_name)
    tokens = optional(flat, "tokens", int, responses_name)

    with reference() as utils:
        for number, prompt in enumerate(prompts, start=1):
            check_instructions(utils, prompt, f"{prompts_name}, row {number} ({label(prompt)})")
        found = []  # of each prompt, its answers' verdicts
        for prompt, each in zip(prompts, answers, strict=True):
            texts = [answer(one["response"]) if strip_think else one["response"] for one in each]
            try:
                found.append([verdicts(utils, prompt, text) for text in texts])
            except re.error as error:  # keywords and section marks go into a pattern as they are
                place = f"{prompts_name}, {label(prompt)}"
                raise InputError(f"{place}: a text in 'kwargs' is no valid regular expression ({error})") from error

    scores: dict[str, Any] = {
        "n_prompts": len(prompts),
        "n_instructions": sum(len(prompt["instruction_id_list"]) for prompt in prompts),
        "truncated_share": None if reasons is None else sum(reason == "length" for reason in reasons) / len(reasons),
        "mean_response_tokens": None if tokens is None else sum(tokens) / len(tokens),
        "strip_think": strip_think,
        "reworded_keys": [
            a["key"] for a, each in zip(prompts, answers, strict=True) if any(a["prompt"] != b["prompt"] for b in each)
        ],
        "per_prompt": [
            entries(
                prompt.get("key"),
                [{f"follow_instruction_list_{kind}": verdict[kind] for kind in _KINDS} for verdict in each],
                sum(all(verdict["strict"]) for verdict in each) / len(each),
            )
            for prompt, each in zip(prompts, found, strict=True)
        ],
        "by_instruction": {},
    }
    for kind in _KINDS:
        lists = [[verdict[kind] for verdict in each] for each in found]
        flags = [[flag for answer_flags in each for flag in answer_flags] for each in lists]
        for level, clusters in (("prompt", [[all(flags) for flags in each] for each in lists]), ("inst", flags)):
            metric = f"{level}_level_{kind}_acc"
            scores[metric], scores[f"{metric}_stderr"] = mean_stderr(clusters)
        for identifier, clusters in _by_instruction(prompts, lists).items():
            count = sum(map(len, clusters)) // len(answers[0])
            entry = scores["by_instruction"].setdefault(identifier, {"n": count})
            entry[f"{kind}_acc"], entry[f"{kind}_acc_stderr"] = mean_stderr(clusters)
    if len(found[0]) > 1:
        scores |= samples.several([[all(verdict["strict"]) for verdict in each] for each in found])
    return scores


def _by_instruction(prompts: list[dict], lists: list[list[list[bool]]]) -> dict[str, list[list[bool]]]:
    """Verdicts by instruction id, those of one prompt in one cluster: some prompts of IFEval use an id twice.

    lists: of each prompt, of each of its answers, a verdict for each instruction.
    """
    found: dict[str, list[list[bool]]] = {}
    for prompt, each in zip(prompts, lists, strict=True):
        own: dict[str, list[bool]] = {}
        for flags in each:
            for identifier, flag in zip(prompt["instruction_id_list"], flags, strict=True):
                own.setdefault(identifier, []).append(flag)
        for identifier, cluster in own.items():
            found.setdefault(identifier, []).append(cluster)
    return found


def check_instructions(utils: Any, prompt: dict, place: str) -> None:
    """Build each instruction once, so that what lm-eval would trip over is told with its place."""
    known = utils.instructions_registry.INSTRUCTION_DICT
    identifiers, kwargs = prompt.get("instruction_id_list"), prompt.get("kwargs")
    if not isinstance(identifiers, list) or not identifiers:
        raise InputError(f"{place}: 'instruction_id_list' is {identifiers!r}, expected a list with at least one id")
    for identifier in identifiers:
        if not isinstance(identifier, str) or identifier not in known:
            names = ", ".join(sorted(known))
            raise InputError(f"{place}: lm-eval does not know the instruction {identifier!r}, only {names}")
    if not isinstance(kwargs, list) or len(kwargs) != len(identifiers) or not all(isinstance(k, dict) for k in kwargs):
        raise InputError(f"{place}: 'kwargs' is {kwargs!r}, expected {len(identifiers)} objects, one an instruction")
    for identifier, arguments in zip(identifiers, kwargs, strict=True):
        try:  # as lm-eval does: an empty value counts as not given
            known[identifier](identifier).build_description(**{k: v for k, v in arguments.items() if v})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{place}: {identifier} refuses the kwargs {arguments!r} ({error!r})") from error
