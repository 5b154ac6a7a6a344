"""What counts as a word of a text, and what as no text at all."""

import re
import unicodedata

# Scripts without spaces between words: each of their characters counts as a word. Chinese and Japanese, Thai, Lao, Tibetan,
# Myanmar and Khmer. (Korean has spaces.)
_SPACELESS = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
    "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
)
# Marks inside a word that are no letters to `re`: combining accents, Hebrew and Arabic vowels, signs of the scripts of India.
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(f"[{_SPACELESS}]|(?:[^\\W_{_SPACELESS}]|[{_MARKS}])+")


def words(text: str) -> list[str]:
    """The words of a text in lower case. Punctuation is part of none; where a script has no spaces, a character is a word."""
    return _WORD.findall(text.lower())


def blank(text: str) -> bool:
    """True if there is nothing to see: spaces, and characters that only join, direct or mark (zero-width ones)."""
    return not text.strip() or all(unicodedata.category(one)[0] in "ZC" for one in text)


def whole(text: str) -> bool:
    """False if the text holds half a character of two: a lone surrogate, which no file in UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
