r"""The number that a text gives as its final answer.

Departures from lm-eval's two filters for gsm8k, because a verdict on a form of writing would be a reward for that form:
- strict-match takes the *first* `#### (\-?[0-9\.\,]+)` and compares texts: `#### $18`, `####18`, `#### **18**` and
  `#### 18.00` are wrong to it, and so is every answer of a model that was never taught the mark. Here the last mark counts,
  and numbers are compared. (evaluation/gsm8k.py reports lm-eval's strict-match beside ours.)
- flexible-extract takes the last number of the text, whatever it says: of "The answer is 18. I used 3 steps." the 3. Here
  what the response itself marks as its answer comes first. Its pattern also takes "..." for a number, the hyphen of "3-4"
  for a sign, and "00" for the answer of "at 10:00".
Nothing is evaluated but a fraction: a sum that is not worked out gives no number as its result.
"""

import re
from collections.abc import Iterator
from decimal import Context, Decimal

from workflow_scripts.plumbing.messages import InputError

MAX_CHARS = 60  # of one number: no answer is longer, and a model that repeats a digit for ever must not cost time
_CONTEXT = Context(prec=MAX_CHARS)  # exact but for fractions; Python's own context is the user's to change

# A plain number in English notation, and a number as it stands in a text. A run is read as a whole (`_read`): of "10:30" or
# "3/4/2024" no part is a number. The quantifiers are possessive, so that nothing is matched from the middle of a run.
_PLAIN = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_FRACTION = re.compile(r"([0-9]+)/([0-9]+)")
_FULL_HOUR = re.compile(r"([0-9]{1,2}):00")
_NUMBER = re.compile(
    r"(?P<power>\^\{?[+-]?)?(?P<sign>-[$£€¥₹]?|[$£€¥₹]-)?"
    r"(?:(?P<whole>[0-9]{1,9}) (?=[0-9]{1,9}/[0-9]))?"
    r"(?P<run>[0-9][0-9.,:/]*+|(?<![0-9A-Za-z.])\.[0-9][0-9.,:/]*+)"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,2})(?![0-9A-Za-z]))?"
)
_RAISED = re.compile(r"\^\{?-?[0-9]")  # 10^5, but not 25^\circ

# Where an answer may be said, and what may stand between that and its number.
_MARK = re.compile(r"#{4,}")
_BOX = re.compile(r"\\f?boxed\s*\{")
_STATEMENT = re.compile(
    r"\banswer\b[*_\"')\]]{0,4}(?:[ \t]+(?:to|for|of)(?:[ \t]+[A-Za-z']+){1,6}?)?[ \t]*"
    r"(?:\b(?:is|was|are|would be|will be|should be|must be|comes (?:out )?to)\b|[:=])",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:[A-Za-z]{1,12}[ \t]*=|\\(?!sqrt)[A-Za-z]+|US\$|(?:USD|EUR|GBP|INR|Rs)\b\.?"
    r"|(?:about|approximately|around|roughly|exactly|only|just|simply|therefore|thus|so|equal to|equals)\b"
    r"|[\s*_\"'`~≈=:({\[\\,$£€¥₹])*+",
    re.IGNORECASE,
)
# What makes of a first number the beginning of a sum: up to two words (a unit), an operator, and a number or a bracket.
_OPERATOR = re.compile(
    r"(?:[ \t]*[A-Za-z%]{1,15}){0,2}?[ \t)]*(?:[-+*/×÷·=x]|\\times|\\div|\\cdot|plus|minus|times|divided by)[ \t]*[-$£€(]*[0-9(]"
)
_HEADING = re.compile(r"(?:\.|[0-9]\))[*_]*[ \t]+[*_]*[A-Za-z]")  # "#### 2. Add them", "#### 2) Add them"

_DASHES = str.maketrans({"−": "-", "‐": "-", "‑": "-", "–": " - ", "\u00a0": "\u2009", "\u202f": "\u2009"})
# Signs as people write them: an en dash right before a number, "negative 5"; "minus 5" where nothing stands before it (`_minus`).
_MINUS = re.compile(r"\bminus[ \t]+(?=[$£€¥₹]?\.?[0-9])", re.IGNORECASE)
_MINUEND = re.compile(r"(?:[0-9)\]}%](?:[ \t]*[A-Za-z%]+){0,3}|(?<![A-Za-z'])[A-Za-z])[ \t]*$")  # 7, 16 eggs, x
_SIGNS = (
    (re.compile(r"–(?=[$£€¥₹]?\.?[0-9])"), "-"),
    (re.compile(r"\bnegative[ \t]+(?=[$£€¥₹]?\.?[0-9])", re.IGNORECASE), "-"),
    (re.compile(r"(?<=[0-9])['’](?=[0-9]{3}(?![0-9]))"), ""),  # 1'234, a Swiss thousand
)
_LATEX = (
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\{,\}(?:\\!)?|,\\!"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<=[0-9])(?:\\[,;: ]|\u2009)(?=[0-9]{3}(?![0-9]))"), ""),  # thin spaces between thousands
    (re.compile(r"\\[,;: ]|\\(?:left|right|quad|qquad)\b|\u2009"), " "),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname)\s*(?=\{)"), ""),
    (re.compile(r"(?<=[0-9])\\[dt]?frac(?=[\s{0-9])"), r" \\frac"),
    (re.compile(r"\\[dt]?frac\s*(?:\{\s*([0-9]{1,60})\s*\}|([0-9]))\s*(?:\{\s*([0-9]{1,60})\s*\}|([0-9]))"), r"\1\2/\3\4"),
)
# A hyphen after a number, a bracket or a letter subtracts or joins ("7 -3", "3-4", "x-3"); elsewhere it is a sign.
_JOINING = re.compile(r"(?:(?<=[0-9)\]}%])[ \t]*+|(?<=[A-Za-z])(?<![0-9][eE]))-")


def final_number(text: str) -> Decimal | None:
    r"""The number that a text gives as its final answer, or None.

    The first of these that is there: the number after the last `####`; in the last `\boxed{}`; after the last "answer is",
    "answer:", "answer =" and the like; the last number of the text. A mark or a statement counts only if its number
    follows at once (on its line, or alone on the next one; currency signs, bold, quotes, "x =", "about" may stand between):
    "#### Step 2: ...", "#### 2. Add them" (headings) and "the answer is the sum of 3 and 4" are passed over. In a box that
    does not begin with its number, the last one counts.

    A number: "18", "-18", "18.00", ".5", "1,234.50", "1/2", "1 1/2", "1.5e3", "1{,}234", "\frac{1}{2}". Currency, percent
    signs and units (also "million") are left out, so 25 % is 25. A full stop at its end is none of it ("2." is 2).
    "7 - 3 = 4" is 4. Of a sum at a mark or in a box the number after the last "=" counts; without "=" the mark is passed
    over. A sum after "answer:" is passed over too, since a whole solution may begin there ("Answer: 16 - 3 = 13. 13 * 2 = 26").
    "3-4" is a 3 and a 4, never -4; "minus 5", "negative 5" and "–5" are -5, but "7 minus 5" is not. Digits are 0 to 9, and
    notation is English: "1.234,50" and the "1,2" of "1,2 and 3" can't be told and are none; an apostrophe may part thousands.
    Times, ratios, dates, versions ("10:30", "3/4/2024", "1.2.3"), powers ("10^5", the 2 of "m^2"), a division by zero and
    anything longer than MAX_CHARS are no numbers, but a full hour is ("10:00 am" is 10: GSM8K asks "at what hour").
    """
    text = _plain(text)
    for found in (_after(text, _MARK, True), _in_box(text), _after(text, _STATEMENT, False)):
        for number in found:
            return number
    return _last(text)


def gold(final: str | int | float | Decimal) -> Decimal:
    """The right answer of a row as a number. InputError on what is none."""
    if isinstance(final, str) and (found := _NUMBER.fullmatch(final.strip())) and not found["power"]:
        if found["run"][-1].isdigit() and (number := _value(found)) is not None:
            return number
    elif isinstance(final, int | float | Decimal) and not isinstance(final, bool):
        number = Decimal(repr(final)) if isinstance(final, float) else Decimal(final)  # a float as JSON wrote it
        if number.is_finite():
            return number
    raise InputError(f"final: found {final!r}, expected a number, such as 18, '1,234.50' or '-3'")


# -- reading ----------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """The text with LaTeX's ways of writing a number undone, and a space around each hyphen that is not a sign."""
    for pattern, plain in _SIGNS:
        text = pattern.sub(plain, text)
    text = _MINUS.sub(_minus, text)
    text = text.translate(_DASHES)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return _JOINING.sub(" - ", text)


def _minus(found: re.Match[str]) -> str:
    """A hyphen for a "minus" that is a sign; itself where something to subtract from stands before it."""
    before = found.string[max(0, found.start() - 40) : found.start()]
    return found[0] if _MINUEND.search(before) else "-"


def _read(run: str) -> Decimal | None:
    """The number that a run of digits and the signs . , : / between them is; None where it is something else."""
    run = run.rstrip(".,:/")
    if len(run) > MAX_CHARS:
        return None
    if _PLAIN.fullmatch(run):
        return Decimal(run.replace(",", ""))
    if fraction := _FRACTION.fullmatch(run):
        above, below = map(Decimal, fraction.groups())
        return _CONTEXT.divide(above, below) if below else None
    hour = _FULL_HOUR.fullmatch(run)
    return Decimal(hour[1]) if hour else None


def _value(found: re.Match[str]) -> Decimal | None:
    """The number of a match of _NUMBER."""
    if found["power"] or _RAISED.match(found.string, found.end()) or (number := _read(found["run"])) is None:
        return None
    if found["whole"]:
        number = _CONTEXT.add(number, Decimal(found["whole"]))
    if found["exponent"]:
        number = number.scaleb(int(found["exponent"]), _CONTEXT)
    return number.copy_negate() if found["sign"] else number


def _last(text: str) -> Decimal | None:
    last = None
    for found in _NUMBER.finditer(text):
        if (number := _value(found)) is not None:
            last = number
    return last


def _direct(text: str, start: int, sums: bool) -> Decimal | None:
    """The number that follows `start` at once. Of a sum, if `sums`, the number after the last "=" of its line."""
    lead = _LEAD.match(text, start, start + 100)
    assert lead is not None  # it may be empty
    found = _NUMBER.match(text, lead.end())
    if found is None or (number := _value(found)) is None:
        return None
    rest = text[found.end() : found.end() + 200].partition("\n")[0]
    if "\n" in lead[0] and re.search(r"[^\W_]", rest):
        return None  # the next line goes on with something else than an answer alone
    if sums and _HEADING.match(found["run"][-1] + rest):
        return None
    if not found["run"][-1].isdigit() or not _OPERATOR.match(rest):
        return number
    _, equals, result = rest.rpartition("=")
    return _direct(result, 0, False) if sums and equals else None


def _after(text: str, pattern: re.Pattern[str], sums: bool) -> Iterator[Decimal]:
    """The numbers that follow at once what `pattern` matches, from the last to the first."""
    for place in reversed([found.end() for found in pattern.finditer(text)]):
        if (number := _direct(text, place, sums)) is not None:
            yield number


def _in_box(text: str) -> Iterator[Decimal]:
    """The numbers of the boxes that are closed, from the last to the first."""
    for place in reversed([found.end() for found in _BOX.finditer(text)]):
        depth, end = 1, place
        while depth and end < min(len(text), place + 300):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if not depth:
            content = text[place : end - 1]
            number = _direct(content, 0, True)
            if number is None:
                number = _last(content)
            if number is not None:
                yield number
