r"""Language share: how much of a completion is written in the scripts of the language that was asked for.

    r = units in the scripts of the language / units in any script

A unit is a word, or one character of a script that is written without spaces (Han, kana, Thai, …). Code, formulas and
LaTeX commands are left out first. Source: the language-consistency reward of DeepSeek-R1 (arXiv 2501.12948, section
2.3.2), which is the share of words in the target language.

What it cannot tell: languages that share a script. English, German and French are all Latin to it, Russian and
Bulgarian both Cyrillic, and Chinese text without kana passes for Japanese; `indistinguishable` lists them. It keeps
reasoning from slipping into another script, and nothing more: telling German from English takes a classifier.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rewards.extract import readable

_CODES = {  # script -> language codes (ISO 639-1) that are written in it
    "LATIN": "en de fr es it pt nl sv da no fi pl cs sk hu ro tr vi id ms tl sw ca hr sl lt lv et",
    "CYRILLIC": "ru uk bg be sr mk kk",
    "ARABIC": "ar fa ur",
    "DEVANAGARI": "hi mr ne",
    "CJK": "zh ja",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "GREEK": "el",
    "HEBREW": "he",
    "THAI": "th",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
}
_LANGUAGES: dict[str, frozenset[str]] = {}
for _script, _codes in _CODES.items():
    for _code in _codes.split():
        _LANGUAGES[_code] = _LANGUAGES.get(_code, frozenset()) | {_script}
_ONE_BY_ONE = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI"})
_QUOTED = (("```", "```"), ("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"), ("`", "`"))
_COMMAND = re.compile(r"\\[A-Za-z]+|</?[a-z_]{1,20}>")
_UNKNOWN = "another"


def language_share(completion: str, language: str) -> float:
    """The share of `completion`, reasoning included, that is in the scripts of `language`; 0.0 without any word.

    Args:
        completion: text of one completion.
        language: a code of ISO 639-1 (`zh`, `en`, `pt-BR`), or the name of a script (`latin`).

    Raises:
        ValueError: the language is not in the table of this file.

    >>> language_share("Сначала сложим: 2 + 2 = 4.", "ru"), language_share("First, сложим: 2 + 2", "ru")
    (1.0, 0.5)
    >>> language_share("先算 two plus two", "zh"), language_share("Zuerst zwei plus zwei", "en")
    (0.4, 1.0)
    """
    wanted = scripts_of(language)
    if not readable(completion):
        return 0.0
    units = _units(_COMMAND.sub(" ", _without_quotes(completion)))
    return sum(script in wanted for script in units) / len(units) if units else 0.0


def scripts_of(language: str) -> frozenset[str]:
    """The scripts, by their Unicode names, that `language` is written in.

    >>> sorted(scripts_of("ja")), sorted(scripts_of("pt-BR")), sorted(scripts_of("Latin"))
    (['CJK', 'HIRAGANA', 'KATAKANA'], ['LATIN'], ['LATIN'])
    """
    if (script := language.upper()) in _CODES:
        return frozenset({script})
    code = re.split("[-_]", language.lower())[0]
    if code not in _LANGUAGES:
        raise ValueError(f"language {language[:80]!r} is not known (want one of {', '.join(sorted(_LANGUAGES))})")
    return _LANGUAGES[code]


def indistinguishable(language: str) -> list[str]:
    """The languages whose text this reward takes for `language`.

    >>> indistinguishable("ru"), indistinguishable("ja"), indistinguishable("ko")
    (['be', 'bg', 'kk', 'mk', 'sr', 'uk'], ['zh'], [])
    """
    wanted = scripts_of(language)
    return sorted(code for code, scripts in _LANGUAGES.items() if scripts <= wanted and code != language.lower())


def _units(text: str) -> list[str]:
    """The script of every unit, in order; a word is a run of letters of one script."""
    units: list[str] = []
    running = ""
    for letter in text:
        script = _script_of(letter)
        if script and script != "mark" and (script in _ONE_BY_ONE or script != running):
            units.append(script)
        running = running if script == "mark" else script
    return units


@lru_cache(maxsize=65536)
def _script_of(letter: str) -> str:
    """The script of a letter, "mark" for what joins letters to words, "" for what separates them."""
    kind = unicodedata.category(letter)
    if kind[0] == "M" or letter in "'’-":
        return "mark"
    if kind[0] != "L":
        return ""
    words = unicodedata.name(letter, _UNKNOWN).split()
    name = words[1] if words[0] in ("FULLWIDTH", "HALFWIDTH") and len(words) > 1 else words[0]
    if name == "MATHEMATICAL":
        return ""
    return "CJK" if name.startswith("CJK") else name if name in _CODES else _UNKNOWN


def _without_quotes(text: str) -> str:
    for opening, closing in _QUOTED:
        kept, place = [], 0
        while (start := text.find(opening, place)) >= 0 and (end := text.find(closing, start + len(opening))) >= 0:
            kept.append(text[place:start])
            place = end + len(closing)
        text = " ".join([*kept, text[place:]])
    return text
