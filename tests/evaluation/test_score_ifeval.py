"""The IFEval scorer: verdicts, standard errors, reproducibility, the join, and what it says to bad input."""

import json
import logging
import math
import os
import random
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from workflow_scripts.evaluation import ifeval
from workflow_scripts.plumbing import jsonl
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import score_ifeval

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ROOT / "data" / "ifeval" / "input_data.jsonl"
RANDOM_KEYS = (1122, 1129)  # a letter of "#" and one of "!", which lm-eval swaps for a random one


def prompt(key, *instructions, text=None):
    """One row of a prompts file; an instruction is an id or (id, kwargs)."""
    pairs = [(item, {}) if isinstance(item, str) else item for item in instructions]
    ids, kwargs = zip(*pairs, strict=True)
    return {
        "key": key,
        "prompt": text or f"prompt number {key}",
        "instruction_id_list": list(ids),
        "kwargs": list(kwargs),
    }


def respond(row, response, **more):
    return {"key": row["key"], "prompt": row["prompt"], "response": response} | more


NO_COMMA, QUOTES, TITLE = "punctuation:no_comma", "startend:quotation", "detectable_format:title"
SHORT = ("length_constraints:number_words", {"relation": "less than", "num_words": 4})
TWO_SENTENCES = ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2})
SHOUT = ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2})
FRENCH = ("language:response_language", {"language": "fr"})

# prompt, response, strict verdicts, loose verdicts, each by hand
HAND = [
    (prompt(1, NO_COMMA, SHORT), "one two three", [True, True], [True, True]),
    (prompt(2, NO_COMMA, SHORT), "one, two three four", [False, False], [False, False]),
    (prompt(3, QUOTES), 'Sure:\n"here it is"', [False], [True]),  # loose may leave out the first line
    (prompt(4, NO_COMMA), "no comma here\nor here, at the end", [False], [True]),  # ... or the last
    (prompt(5, QUOTES), '**"bold"**', [False], [True]),  # ... or the asterisks
    (prompt(6, NO_COMMA, SHORT), "", [False, False], [False, False]),  # nothing follows nothing
    (prompt(7, TWO_SENTENCES), "Dr. Who came at 3 p.m. yesterday.", [False], [False]),  # Punkt knows the abbreviations
    (prompt(8, TWO_SENTENCES), "It rains. We stay.", [True], [True]),
    (prompt(9, SHOUT), "LOOK at the WELL-KNOWN cat", [True], [True]),
    (prompt(10, FRENCH, TITLE), "Il fait beau dans le jardin <<Bonjour>>", [True, True], [True, True]),
    (prompt(11, "detectable_format:json_format", NO_COMMA), "[" * 5000, [False, True], [False, True]),  # json gives up
    (prompt(12, SHORT, SHORT, QUOTES), '"two words"', [True, True, True], [True, True, True]),
]
HAND_PROMPTS = [row for row, *_ in HAND]
HAND_RESPONSES = [respond(row, response) for row, response, *_ in HAND]


def real_rows():
    """The 541 prompts with answers of many shapes, so that instructions are both followed and broken."""
    rows = jsonl.read_jsonl(PROMPTS)
    shapes = [
        lambda p: "A plain answer in a few words. It has two sentences.",
        lambda p: p["prompt"] + "\n\nP.S. " + "So it goes, and so on. " * 40,
        lambda p: "* one\n* two\n* three\n\n<<A title>>\n\n[name] [place] *this* *that* *those*",
        lambda p: '"LOUD AND CLEAR, SAID THE MAN WITH THE HAT."',
        lambda p: "sure, here you are:\nall of this is written in lower case without any stop",
        lambda p: '```json\n{"a": ["b", "c"]}\n```',
        lambda p: "Das ist ein deutscher Satz über das Wetter und die schönen Berge.\n***\nEin zweiter.",
        lambda p: "My answer is yes.\n\nSection 1\nfirst\nSection 2\nsecond\n******\nIs there anything else I can help with?",
        lambda p: "",
    ]
    return rows, [respond(row, shapes[i % len(shapes)](row)) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def real():
    prompts, responses = real_rows()
    return prompts, responses, ifeval.score(prompts, responses, strip_think=False)


# verdicts


def test_verdicts_are_those_worked_by_hand():
    found = ifeval.score(HAND_PROMPTS, HAND_RESPONSES, strip_think=False)["per_prompt"]
    assert found == [
        {"key": row["key"], "follow_instruction_list_strict": strict, "follow_instruction_list_loose": loose}
        for row, _, strict, loose in HAND
    ]


def test_summary_is_that_worked_by_hand():
    scores = ifeval.score(HAND_PROMPTS, HAND_RESPONSES, strip_think=False)
    assert (scores["n_prompts"], scores["n_instructions"]) == (12, 19)
    assert scores["prompt_level_strict_acc"] == 5 / 12
    assert scores["prompt_level_loose_acc"] == 8 / 12
    assert scores["inst_level_strict_acc"] == 10 / 19
    assert scores["inst_level_loose_acc"] == 13 / 19
    assert scores["prompt_level_strict_acc_stderr"] == pytest.approx(math.sqrt(5 / 12 * 7 / 12 / 11))
    short = scores["by_instruction"][SHORT[0]]
    # five of them in four prompts, followed 1/1, 0/1, 0/1, 2/2: 4/3 * (0.4^2 + 0.6^2 + 0.6^2 + 0.8^2) / 5^2
    assert (short["n"], short["strict_acc"]) == (5, 3 / 5)
    assert short["strict_acc_stderr"] == pytest.approx(math.sqrt(4 / 3 * 1.52) / 5)
    assert scores["by_instruction"][TITLE]["strict_acc_stderr"] is None  # one prompt
    assert sum(entry["n"] for entry in scores["by_instruction"].values()) == 19


def test_the_541_prompts_of_ifeval_are_scored(real):
    prompts, _, scores = real
    assert (scores["n_prompts"], scores["n_instructions"], len(scores["by_instruction"])) == (541, 834, 25)
    assert [entry["key"] for entry in scores["per_prompt"]] == [row["key"] for row in prompts]
    assert 0.1 < scores["inst_level_strict_acc"] < scores["inst_level_loose_acc"] < 0.9


def test_verdicts_equal_those_of_lm_evals_process_results(real):
    prompts, responses, scores = real
    with ifeval.reference() as utils:
        for row, answer, entry in zip(prompts, responses, scores["per_prompt"], strict=True):
            if row["key"] not in RANDOM_KEYS:
                expected = utils.process_results(row, [answer["response"]])
                assert entry["follow_instruction_list_strict"] == expected["inst_level_strict_acc"], row["key"]
                assert entry["follow_instruction_list_loose"] == expected["inst_level_loose_acc"], row["key"]
        strict = [entry["follow_instruction_list_strict"] for entry in scores["per_prompt"]]
        assert scores["inst_level_strict_acc"] == utils.agg_inst_level_acc(strict)


def test_no_other_prompt_of_ifeval_draws_a_random_number(real):
    prompts, _, _ = real
    with ifeval.reference() as utils:
        drawn = []
        for row in prompts:
            random.seed(0)
            before = random.getstate()
            utils.process_results(row, ["Any text will do."])
            if random.getstate() != before:
                drawn.append(row["key"])
    assert tuple(sorted(drawn)) == RANDOM_KEYS


# what is random in the reference


def letter_of(key):
    return random.Random(key).choice(list(string.ascii_letters)).lower()


@pytest.mark.slow
@pytest.mark.parametrize("key", RANDOM_KEYS)
def test_a_random_letter_follows_from_the_key_alone(real, key):
    prompts, responses = (rows[::10] + [row for row in rows if row["key"] == key] for rows in real[:2])  # some, and this one
    position = len(prompts) - 1
    row = prompts[position]
    which = row["instruction_id_list"].index("keywords:letter_frequency")
    others = (string.ascii_lowercase.replace(letter_of(key), "") + " ") * 9
    for text, expected in ((letter_of(key) * 6, True), (others, False)):
        answers = [*responses[:position], respond(row, text), *responses[position + 1 :]]
        for order in (slice(None), slice(None, None, -1)):
            random.seed(99)
            scores = ifeval.score(prompts[order], answers[::3] + answers[1::3] + answers[2::3], strip_think=False)
            entry = next(entry for entry in scores["per_prompt"] if entry["key"] == key)
            assert entry["follow_instruction_list_strict"][which] is expected
            assert entry["follow_instruction_list_loose"][which] is expected
        with ifeval.reference() as utils:  # the reference by itself gives both verdicts
            random.seed(0)
            free = {tuple(utils.process_results(row, [letter_of(key) * 6])["inst_level_strict_acc"]) for _ in range(300)}
        assert len(free) == 2


@pytest.mark.slow
def test_a_language_that_langdetect_wavers_on_is_judged_alike_each_time():
    from langdetect import detect

    text = "vamos a la playa oh oh"  # unseeded: one draw in four says Tagalog
    assert len({detect(text) for _ in range(50)}) > 1
    rows = [prompt(key, ("language:response_language", {"language": "es"})) for key in range(50)]
    scores = ifeval.score(rows, [respond(row, text) for row in rows], strip_think=False)
    assert scores["inst_level_strict_acc"] in (0, 1)


def test_the_order_of_rows_changes_no_verdict_and_no_number(real):
    prompts, responses, scores = real
    pairs = list(zip(prompts, responses, strict=True))
    random.Random(1).shuffle(pairs)
    shuffled = ifeval.score([row for row, _ in pairs], [row for _, row in reversed(pairs)], strip_think=False)
    by_key = {entry["key"]: entry for entry in scores["per_prompt"]}
    assert shuffled["per_prompt"] == [by_key[row["key"]] for row, _ in pairs]
    assert shuffled | {"per_prompt": None} == scores | {"per_prompt": None}


def test_the_state_of_the_process_is_put_back():
    import langdetect
    import nltk.data
    import nltk.pathsec
    import nltk.redos

    def state():
        logger = logging.getLogger("lm_eval.tasks.ifeval.instructions")
        limits = (langdetect.DetectorFactory.seed, nltk.redos.DEFAULT_TIMEOUT, nltk.pathsec.ENFORCE, logger.disabled)
        return random.getstate(), list(nltk.data.path), os.environ.get("NLTK_DATA"), limits

    before = state()
    ifeval.score(HAND_PROMPTS, HAND_RESPONSES, strip_think=False)
    assert state() == before
    with pytest.raises(InputError):
        ifeval.score([prompt(1, "no:such_id")], [respond(prompt(1, NO_COMMA), "x")], strip_think=False)
    assert state() == before


GUARDED = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    print("NETWORK", args[1:], file=sys.stderr)
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from workflow_scripts.steps import score_ifeval
heavy = {"torch", "lm_eval", "nltk", "datasets", "numpy"} & set(sys.modules)
assert not heavy, f"--help would load {heavy}"
del sys.modules["workflow_scripts.steps.score_ifeval"]
sys.argv = ["score_ifeval", *sys.argv[1:]]
runpy.run_module("workflow_scripts.steps.score_ifeval", run_name="__main__")
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_the_command_gives_the_same_bytes_in_any_process_without_network(real, tmp_path):
    _, responses, scores = real
    found = []
    for seed, rows in (("1", responses), ("2", responses[::-1])):
        jsonl.write_jsonl(tmp_path / "responses.jsonl", rows)
        output = tmp_path / seed / "scores.json"
        paths = ("--prompts", PROMPTS, "--responses", tmp_path / "responses.jsonl", "--output", output)
        home = {"HOME": str(tmp_path), "PYTHONHASHSEED": seed, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            [sys.executable, "-c", GUARDED, *paths], env=home, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert len(run.stdout.splitlines()) == 4 and "(541 prompts)" in run.stdout and "(834 instructions)" in run.stdout
        found.append(output.read_bytes())
    assert found[0] == found[1]
    assert found[0].endswith(b"}\n") and json.loads(found[0]) == scores


@pytest.mark.slow
def test_the_tables_are_read_whatever_mode_owner_and_links_the_checkout_has(tmp_path):
    """All at once: each by itself is what NLTK could refuse."""
    shutil.copytree(ROOT / "workflow_scripts", tmp_path / "clone/workflow_scripts")
    for i, path in enumerate([tmp_path / "clone", *(tmp_path / "clone").rglob("*")]):
        path.chmod(path.stat().st_mode | 0o020)  # a clone made under umask 0002
        if path.is_file():
            os.link(path, tmp_path / f"another name {i}")
        if not os.geteuid():  # only root may give files away
            os.chown(path, 12345, 12345)
    jsonl.write_jsonl(tmp_path / "prompts.jsonl", HAND_PROMPTS)
    jsonl.write_jsonl(tmp_path / "responses.jsonl", HAND_RESPONSES)
    command = [sys.executable, "-m", "workflow_scripts.steps.score_ifeval", "--prompts", "prompts.jsonl"]
    command += ["--responses", "responses.jsonl", "--output", "scores.json"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "clone"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads((tmp_path / "scores.json").read_text()) == ifeval.score(HAND_PROMPTS, HAND_RESPONSES, strip_think=False)


# standard errors

CLUSTERS = [[True, True], [False, True], [False]]


def test_clustered_standard_error_equals_the_sum_worked_by_hand():
    mean, stderr = ifeval.mean_stderr(CLUSTERS)  # 3 of 5; residuals by cluster 0.8, -0.2, -0.6
    assert mean == 0.6
    assert stderr == pytest.approx(math.sqrt(3 / 2 * (0.64 + 0.04 + 0.36)) / 5)


def test_clustered_standard_error_equals_that_of_statsmodels(real):
    import numpy as np
    import statsmodels.api as sm

    _, _, scores = real
    real_clusters = [entry["follow_instruction_list_loose"] for entry in scores["per_prompt"]]
    for clusters in (CLUSTERS, real_clusters):
        flat = np.array([float(flag) for cluster in clusters for flag in cluster])
        groups = [number for number, cluster in enumerate(clusters) for _ in cluster]
        fit = sm.OLS(flat, np.ones(len(flat))).fit(cov_type="cluster", cov_kwds={"groups": groups})
        assert ifeval.mean_stderr(clusters) == pytest.approx((fit.params[0], fit.bse[0]), rel=1e-12)
    assert scores["inst_level_loose_acc_stderr"] == pytest.approx(fit.bse[0], rel=1e-12)


def test_prompt_level_standard_error_equals_that_of_lm_eval(real):
    from lm_eval.api.metrics import mean_stderr

    _, _, scores = real
    items = [all(entry["follow_instruction_list_strict"]) for entry in scores["per_prompt"]]
    assert scores["prompt_level_strict_acc_stderr"] == pytest.approx(mean_stderr(items), rel=1e-12)


def test_a_single_prompt_has_no_standard_error(tmp_path, capsys):
    jsonl.write_jsonl(tmp_path / "p.jsonl", HAND_PROMPTS[:1])
    jsonl.write_jsonl(tmp_path / "r.jsonl", HAND_RESPONSES[:1])
    scores = score_ifeval.main(tmp_path / "p.jsonl", tmp_path / "r.jsonl", tmp_path / "s.json", strip_think=False)
    assert scores["prompt_level_strict_acc"] == 1 and scores["prompt_level_strict_acc_stderr"] is None
    assert capsys.readouterr().out.count("n/a") == 4


# optional fields and reasoning


def test_truncated_share_and_mean_tokens_are_null_where_not_given():
    scores = ifeval.score(HAND_PROMPTS, HAND_RESPONSES, strip_think=False)
    assert scores["truncated_share"] is None and scores["mean_response_tokens"] is None
    rows = [row | {"finish_reason": "stop", "tokens": 10} for row in HAND_RESPONSES]
    rows[4] |= {"finish_reason": "length", "tokens": 22}
    scores = ifeval.score(HAND_PROMPTS, rows, strip_think=False)
    assert scores["truncated_share"] == 1 / 12 and scores["mean_response_tokens"] == 11


@pytest.mark.parametrize(
    "response, expected",
    [
        ("<think>a, b</think>\n\nthe answer", "the answer"),
        ("a, b</think> the answer", "the answer"),  # the template wrote the opening tag
        ("<think>one</think><think>two</think>three", "three"),
        ("<think>cut off before", ""),
        ("  no reasoning\n", "  no reasoning\n"),
    ],
)
def test_reasoning_is_stripped(response, expected):
    assert ifeval.answer(response) == expected


def test_reasoning_counts_unless_it_is_stripped():
    row = prompt(1, NO_COMMA)
    rows = [respond(row, "<think>well, well</think>\nno comma")]
    assert ifeval.score([row], rows, strip_think=True)["prompt_level_strict_acc"] == 1
    assert ifeval.score([row], rows, strip_think=False)["prompt_level_strict_acc"] == 0


# the join


def test_rows_without_keys_are_joined_by_the_prompt():
    expected = ifeval.score(HAND_PROMPTS, HAND_RESPONSES, strip_think=False)
    bare = [{k: v for k, v in row.items() if k != "key"} for row in reversed(HAND_RESPONSES)]
    assert ifeval.score(HAND_PROMPTS, bare, strip_think=False) == expected
    half = bare[:3] + HAND_RESPONSES[:-3]  # keys in some rows only
    assert ifeval.score(HAND_PROMPTS, half, strip_think=False) == expected


def test_rows_with_keys_are_joined_by_key_whatever_the_prompt_says(tmp_path, capsys):
    rows = [row | {"prompt": "older wording"} if row["key"] == 3 else row for row in HAND_RESPONSES]
    scores = ifeval.score(HAND_PROMPTS, rows, strip_think=False)
    assert scores["reworded_keys"] == [3]
    assert scores | {"reworded_keys": []} == ifeval.score(HAND_PROMPTS, HAND_RESPONSES, strip_think=False)
    jsonl.write_jsonl(tmp_path / "p.jsonl", HAND_PROMPTS)
    jsonl.write_jsonl(tmp_path / "r.jsonl", rows)
    score_ifeval.main(tmp_path / "p.jsonl", tmp_path / "r.jsonl", tmp_path / "s.json", strip_think=False)
    assert "under key 3; joined by key" in capsys.readouterr().err


def test_two_prompts_of_the_same_text_need_keys():
    twins = [prompt(1, NO_COMMA, text="same"), prompt(2, TITLE, text="same")]
    scores = ifeval.score(twins, [respond(twins[1], "x"), respond(twins[0], "x")], strip_think=False)
    assert [entry["follow_instruction_list_strict"] for entry in scores["per_prompt"]] == [[True], [False]]
    with pytest.raises(InputError, match="P: the prompt that begins 'same' stands in two rows; .*'key' of its own"):
        ifeval.score(twins, [{"prompt": "same", "response": "x"}], False, "P", "R")
