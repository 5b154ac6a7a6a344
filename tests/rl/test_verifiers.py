"""The verifiers that are rewards: which number a text gives, whether it is the right one, which share of instructions holds."""

import json
import random
import re
from decimal import Decimal, localcontext
from pathlib import Path

import pytest

from tests.support import cpu
from workflow_scripts.data import formats
from workflow_scripts.evaluation import ifeval
from workflow_scripts.evaluation.numerals import MAX_CHARS, final_number, gold
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl.verifiers import ifeval_share, numeric

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"train": 7473, "test": 1319}


@pytest.fixture(scope="module")
def gsm8k():
    """(question, worked answer, its number as a text without commas) of both parts."""
    found = []
    for part, count in PARTS.items():
        lines = (ROOT / f"data/gsm8k/{part}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == count
        for line in lines:
            row = json.loads(line)
            found.append((row["question"], row["answer"], row["answer"].rpartition("#### ")[2].replace(",", "")))
    return found


# -- GSM8K's own answers -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_answer_of_gsm8k_is_right_as_text_and_as_number(gsm8k):
    for _, answer, final in gsm8k:
        assert numeric(answer, final) and numeric(answer, int(final)) and numeric(answer, Decimal(final)), answer


def changed(final: str) -> set[str]:
    number = int(final)
    texts = {str(number + 1), str(number - 1), str(-number), str(number * 10), f"{final}.5", final[:-1], final[1:]}
    return {text for text in texts - {"", "-"} if Decimal(text) != number}


@pytest.mark.slow
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
def test_no_answer_of_gsm8k_is_right_once_its_number_is_changed(gsm8k, every):
    assert changed("18") == {"19", "17", "-18", "180", "18.5", "1", "8"}
    for _, answer, final in gsm8k[::every]:
        work = answer.rpartition("#### ")[0]
        for wrong in changed(final):
            assert not numeric(f"{work}#### {wrong}", final), (answer, wrong)


def test_the_canonical_rows_of_both_parts_are_right(gsm8k):
    for question, answer, _ in gsm8k:
        _, row = formats.convert({"question": question, "answer": answer}, "numeric", "gsm8k")
        assert numeric(row["answer"], row["final"])


def lm_eval_filters():
    import yaml
    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks import __file__ as tasks

    task = yaml.safe_load((Path(tasks).parent / "gsm8k/gsm8k.yaml").read_text())
    made = {}
    for entry in task["filter_list"]:
        options = {key: value for key, value in entry["filter"][0].items() if key != "function"}
        made[entry["name"]] = RegexFilter(**options)
    return made


@pytest.mark.slow
def test_both_filters_of_lm_eval_find_the_same_number_in_every_answer_of_gsm8k(gsm8k):
    for name, pattern in lm_eval_filters().items():
        found = pattern.apply([[answer] for _, answer, _ in gsm8k], [{}] * len(gsm8k))
        for (_, answer, _), [text] in zip(gsm8k, found, strict=True):
            assert Decimal(text.replace(",", "")) == final_number(answer), (name, answer)


@pytest.mark.slow
def test_without_the_mark_we_differ_from_flexible_extract_on_times_and_fractions_alone(gsm8k):
    flexible = lm_eval_filters()["flexible-extract"]
    bodies = [answer.rpartition("\n####")[0] for _, answer, _ in gsm8k]
    differ = ours = theirs = 0
    for body, [text], (_, _, final) in zip(bodies, flexible.apply([[body] for body in bodies], [{}]), gsm8k, strict=True):
        text = re.sub(r"[,$]", "", text).removesuffix(".")
        number = final_number(body)
        ours += number == Decimal(final)
        theirs += text == final  # lm-eval compares texts: "18.00" is not 18
        if not re.fullmatch(r"-?[0-9]*\.?[0-9]+", text) or Decimal(text) != number:
            differ += 1
            assert re.search(r"[0-9]:[0-9]{2}|[0-9]/[0-9]", body[-60:]), body
    assert differ < 12 and ours > theirs > 8000


# -- texts that are easy to misread --------------------------------------------------------------------------------------

TEXTS = [
    # the mark
    ("so 3\n#### 18", "18"),
    ("####18", "18"),
    ("##### 18", "18"),
    ("#### $1,080", "1080"),
    ("#### **18**", "18"),
    ("#### -10", "-10"),
    ("#### −10", "-10"),
    ("#### 18.00 dollars", "18"),
    ("#### 10,800.", "10800"),
    ("#### 18%", "18"),
    ("#### 18\nThat is all, in 2 lines.", "18"),
    ("#### 18\n\nWait.\n#### 20", "20"),
    ("#### 18 ####", "18"),
    ("####\n18", "18"),
    ("#### 18 eggs (3 a day)", "18"),
    ("#### 5 + 3 = 8", "8"),
    ("#### 18 eggs - 3 eggs = 15 eggs", "15"),
    ("#### 18\nThe answer is 20", "18"),
    ("#### Step 2: add\nSo there are 7 eggs.", "7"),  # a heading
    ("#### 2. Add them\nSo there are 7 eggs.", "7"),
    ("#### 2) **Add**\nSo there are 7 eggs.", "7"),
    ("#### **2.** Add\nSo there are 7 eggs.", "7"),
    ("#### Answer: 5\nin 3 steps", "5"),
    ("#### unknown, of 4", "4"),
    ("#### 5 + 3", "3"),  # not worked out: passed over, so the last number
    # the box
    (r"The answer is $\boxed{18}$, after 3 steps", "18"),
    (r"\boxed{\$1{,}234}", "1234"),
    (r"\boxed{1,\!234}", "1234"),
    (r"\boxed{1\,234} km in 2 h", "1234"),
    (r"\boxed{\frac{1}{2}} of 9", "0.5"),
    (r"\boxed{-\dfrac{1}{4}} of 9", "-0.25"),
    (r"\boxed{1\frac12} of 9", "1.5"),
    (r"\boxed{18 \text{ eggs in 2 boxes}}", "18"),
    (r"\boxed{x = 5} of 9", "5"),
    (r"\boxed{\text{Ann has } 5} of 9", "5"),
    (r"\boxed{3} and then \boxed{4}, 9", "4"),
    (r"\boxed{}, 9", "9"),
    (r"\boxed{18", "18"),
    (r"\boxed{25^\circ} of 90", "25"),
    # the statement
    ("The answer is 18. I used 3 steps.", "18"),
    ("The final answer is: $18$ (2 ways)", "18"),
    ("**Answer:** 18 eggs, 2 each", "18"),
    ("**Answer**: **18** of 20", "18"),
    ("Answer = -$5, not 4", "-5"),
    ("answer: $-5, not 4", "-5"),
    ("ANSWER: about 12 of 13", "12"),
    ("The answer is x = 12 of 13", "12"),
    ("The answer to the question is 18 (9 * 2)", "18"),
    ("The answer is 18. No: the answer is 20. 3 steps.", "20"),
    ("The answer is not 18. It is 20.", "20"),
    ("Answer:\n\n**18**\n\nChecked 2 times.", "18"),
    ("Answer:\n16 - 3 = 13 eggs.\n13 * 2 = 26", "26"),  # a whole solution begins there
    ("Answer:\n16 eggs are laid, 3 eaten.\nThat leaves 13.", "13"),
    ("Answer: 16 - 3 = 13. 13 * 2 = 26", "26"),
    ("Answer: 16 eggs minus 3 eggs leaves 13", "13"),
    ("The answer is the sum of 3 and 4, which is 7", "7"),
    ("20 answers are on the page, 3 on each of 4", "4"),
    # the last number
    ("7 - 3 = 4", "4"),
    ("7 -3", "3"),
    ("3-4", "4"),
    ("3–4", "4"),
    ("3 – 4", "4"),
    ("#### –5", "-5"),
    ("The answer is –5.", "-5"),
    ("#### minus 5", "-5"),
    ("The answer is minus 5.", "-5"),
    ("So it is negative 5", "-5"),
    ("The answer is negative $12.50.", "-12.5"),
    ("7 minus 5", "5"),
    ("That is 16 eggs minus 3", "3"),
    ("x minus 3", "3"),
    ("(2 + 4) minus 1", "1"),
    ("#### 1'234", "1234"),
    ("The answer is 12’345’678.", "12345678"),
    ("#### ١٢", None),  # digits are 0 to 9, in answers as in what they are held against
    ("x-3", "3"),
    ("it is -3", "-3"),
    ("(-3)", "-3"),
    ("he lost -$3", "-3"),
    ("1,2 and 3", "3"),
    ("10:30", None),
    ("open at 8, from 10:30 on", "8"),
    ("10:00 am", "10"),
    ("2.", "2"),
    ("$1,234.50.", "1234.5"),
    ("1,080,000", "1080000"),
    ("1\u202f234 km", "1234"),
    ("18.00", "18"),
    (".5", "0.5"),
    ("so...5", "5"),
    ("the end.5 eggs", "5"),
    ("25 %", "25"),
    ("25 m^2", "25"),
    ("10^5", None),
    ("1.5e3", "1500"),
    ("1e5.", "100000"),
    ("1/2", "0.5"),
    ("2 1/2 hours", "2.5"),
    ("1/0", None),
    ("on 3/4/2024", None),
    ("version 1.2.3", None),
    ("1.234,50", None),
    ("<<16-3-4=9>>9 eggs", "9"),
    ("£18 or so", "18"),
    ("٣", None),  # digits of other scripts
    ("½", None),
    ("eighteen", None),
    ("", None),
    ("####", None),
    ("The answer is", None),
    (r"\boxed{", None),
    ("9" * MAX_CHARS, "9" * MAX_CHARS),
    ("9" * (MAX_CHARS + 1), None),
    ("5 and " + "9" * 500, "5"),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[repr(text)[:40] for text, _ in TEXTS])
def test_the_number_that_a_text_gives(text, expected):
    assert final_number(text) == (None if expected is None else Decimal(expected))


def test_a_fraction_equals_itself_and_no_rounded_number():
    assert numeric("#### 1/3", "1/3") and numeric("2/6", "1/3")
    assert not numeric("0.333", "1/3") and not numeric("1/3", "0.333")


def test_pythons_decimal_context_changes_no_number():
    text = "#### 1,234,567.891"
    with localcontext() as context:
        context.prec = 3
        assert final_number(text) == Decimal("1234567.891") and not numeric(text, "1234567.892")
        third = final_number("1 1/3")
    assert third == final_number("1 1/3")


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "1," * 300_000,
        "1,234" + ",567" * 100_000,
        "-" * 300_000 + "3",
        "5" + " " * 300_000 + "-3",
        "answer=" * 40_000,
        "answer:\n" * 40_000,
        "#### " * 40_000,
        r"\frac{" * 40_000,
        r"\boxed{" * 5_000,
        "1 1/" * 100_000,
        "answer to " + "a " * 100_000,
    ],
    ids=lambda text: text[:12],
)
def test_long_garbage_takes_no_time(text):
    before = cpu.seconds()
    final_number(text)
    assert cpu.seconds() - before < 5  # each takes 0.4 s at most; what grows with the square takes minutes


def test_garbage_never_raises():
    pieces = [
        "#### ",
        r"\boxed{",
        "answer is ",
        "}",
        "-",
        "$",
        "1",
        "9,",
        ".",
        "/",
        "0",
        ":",
        "^{",
        r"\frac{",
        "e",
        "=",
        "\n",
        "*",
    ]
    rng = random.Random(1)
    numbers = 0
    for _ in range(5000):
        number = final_number("".join(rng.choices(pieces, k=rng.randint(1, 25))))
        numbers += number is not None
        assert number is None or number.is_finite()
    assert numbers > 1000


@pytest.mark.parametrize(
    "final", ["", "none", "18 eggs", "1.234,50", "10:30", "1/0", "2.", None, True, [18], float("nan"), "9" * 61]
)
def test_a_right_answer_that_is_no_number_is_refused(final):
    with pytest.raises(InputError, match="final: found .*, expected a number"):
        numeric("18", final)


@pytest.mark.parametrize("final", ["18", " 18 ", "18.0", 18, 18.0, Decimal("18.000"), "36/2", "1.8e1"])
def test_right_answers_may_be_texts_and_numbers(final):
    assert gold(final) == 18 and numeric("#### 18", final) and not numeric("#### 19", final) and not numeric("", final)


# -- IFEval --------------------------------------------------------------------------------------------------------------

NO_COMMA = ("punctuation:no_comma", {})
QUOTES = ("startend:quotation", {})
SHORT = ("length_constraints:number_words", {"relation": "less than", "num_words": 4})
HASH = ("keywords:letter_frequency", {"letter": "#", "let_frequency": 4, "let_relation": "at least"})

SHARES = [  # instructions, response, share that is followed strictly, by hand
    ([NO_COMMA], "one two", 1),
    ([NO_COMMA], "one, two", 0),
    ([NO_COMMA, SHORT], "one two three four", 1 / 2),
    ([NO_COMMA, SHORT, QUOTES], '"one two"', 1),
    ([NO_COMMA, SHORT, QUOTES], "one two", 2 / 3),
    ([QUOTES], 'Sure:\n"one"', 0),  # followed loosely alone
    ([NO_COMMA, SHORT], "", 0),
    ([("detectable_format:json_format", {}), NO_COMMA], "[" * 5000, 1 / 2),
]


def row(instructions, key=1):
    names, kwargs = zip(*instructions, strict=True)
    return {"key": key, "prompt": "a prompt", "instruction_id_list": list(names), "kwargs": list(kwargs)}


@pytest.mark.parametrize(("instructions", "response", "expected"), SHARES)
def test_the_share_of_instructions_that_a_response_follows(instructions, response, expected):
    with ifeval.reference() as utils:
        assert ifeval_share(utils, row(instructions), response) == expected


def test_the_share_is_that_of_the_evaluations_strict_verdicts():
    rows = [json.loads(line) for line in (ROOT / "data/ifeval/input_data.jsonl").read_text().split("\n") if line][:120]
    texts = ["A plain answer. It has two sentences.", '"ALL IN CAPITALS"', "* one\n* two\n\n<<A title>>", ""]
    responses = [{"key": one["key"], "prompt": one["prompt"], "response": texts[i % 4]} for i, one in enumerate(rows)]
    scores = ifeval.score(rows, responses, strip_think=False)
    with ifeval.reference() as utils:
        shares = [ifeval_share(utils, one, given["response"]) for one, given in zip(rows, responses, strict=True)]
    strict = [entry["follow_instruction_list_strict"] for entry in scores["per_prompt"]]
    assert shares == [sum(flags) / len(flags) for flags in strict] and 0 < sum(shares) < len(shares)


def test_a_share_depends_on_the_row_alone_and_leaves_the_random_numbers_as_they_were():
    random.seed(5)
    before = random.getstate()
    found = set()
    for seed in range(30):
        with ifeval.reference() as utils:
            random.seed(seed)
            found.add(ifeval_share(utils, row([HASH], key=1122), "abcdefghijklmnopqrstuvwxyz" * 4))
        assert random.getstate() == before
    assert found == {1.0}  # the letter that the checker draws follows from the key


BAD_ROWS = [
    row([NO_COMMA]) | {"instruction_id_list": [], "kwargs": []},
    row([NO_COMMA]) | {"kwargs": []},
    row([("no:such_id", {})]),
    row([("length_constraints:number_words", {"relation": "at most", "num_words": 3})]),
    row([("keywords:existence", {"keywords": ["(("]})]),
    {"key": 1, "prompt": "a prompt"},
]


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_that_cant_be_judged_is_named(bad):
    with ifeval.reference() as utils, pytest.raises(InputError, match="^the prompt with key 1: .* correct the row$"):
        ifeval_share(utils, bad, "any text")
