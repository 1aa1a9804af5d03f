"""Behavioural checks in the manner of CheckList: expectations/behaviour.yaml says what the model should do."""

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import UsageError
from tasks.text import clean
from tasks.training import disguises

CHECKS = Path(__file__).parents[2] / "expectations" / "behaviour.yaml"
KINDS = ("minimum", "invariance", "direction", "obfuscation")
MOST = 25  # cases of one entry: a template of many words must not outvote the others

SLOT = re.compile(r"\{(\w+)\}")


# The file -------------------------------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Entry(Strict):
    capability: str = Field(min_length=1)
    language: Literal["en", "ru"]
    text: str = Field(min_length=1)
    words: dict[str, list[str]] = {}


class Minimum(Entry):
    toxic: bool


class Invariance(Entry):
    change: list[Literal["lower", "upper", "typo", "emoji", "no_punctuation"]] = []
    vary: list[str] = []
    variants: list[str] = []


class Direction(Entry):
    worse: str = Field(min_length=1)


class Obfuscation(Entry):
    change: list[Literal[*disguises.WAYS]] = Field(min_length=1)


class Checks(Strict):
    words: dict[Literal["en", "ru"], dict[str, list[str]]] = {}
    minimum: list[Minimum] = []
    invariance: list[Invariance] = []
    direction: list[Direction] = []
    obfuscation: list[Obfuscation] = []


@dataclass(frozen=True)
class Case:
    """One thing to check: `texts` are the message itself, then those it is compared with."""

    kind: str
    capability: str
    language: str
    texts: tuple[str, ...]
    toxic: bool | None = None  # the right answer, of a `minimum`


def read(file: Path = CHECKS) -> list[Case]:
    """All cases of a file, templates filled in.

    Raises:
        UsageError: the file can't be read, or an entry is wrong; the message names file, entry, key and the way out.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        checks = Checks.model_validate(values)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UsageError(f"{file}: {_problem(error, values)}") from None
    cases = []
    for kind in KINDS:
        for position, entry in enumerate(getattr(checks, kind)):
            try:
                cases += _cases(kind, entry, checks.words.get(entry.language, {}) | entry.words)
            except ValueError as error:
                raise UsageError(f"{file}: {_entry_name(kind, position, entry.text)}: {error}") from None
    if not cases:
        raise UsageError(f"{file} has no check: add an entry under one of {', '.join(KINDS)}")
    return cases


def _problem(error: ValidationError, values) -> str:
    """The first problem of a file that doesn't fit the classes above, in words."""
    first = error.errors()[0]
    kind, position, *keys = [*first["loc"], None, None][: max(len(first["loc"]), 2)]
    entry = values[kind][position] if isinstance(position, int) and isinstance(values[kind], list) else None
    where = _entry_name(kind, position, entry.get("text")) if isinstance(entry, dict) else _path(first["loc"])
    key = _path(keys)
    if first["type"] == "missing":
        return f"{where}: {key} is missing, add it; the head of the file says what belongs in an entry"
    if first["type"] == "extra_forbidden":
        return f"{where}: {key or where} is no key that is known here; the head of the file lists them"
    return f"{where}: {f'{key}=' if key else ''}{first['input']!r}: {first['msg']}"


def _entry_name(kind: str, position: int, text) -> str:
    return f"{kind}[{position}] ({text!r})"


def _path(keys) -> str:
    return ".".join(str(key) for key in keys if key is not None)


# From entries to cases ------------------------------------------------------------------------------------------------


def _cases(kind: str, entry, words: dict[str, list[str]]) -> list[Case]:
    """The cases of one entry: every way to fill its slots, at most MOST, the same ones each time.

    Raises:
        ValueError: a slot has no words, or the entry compares its message with nothing.
    """
    variants, vary = getattr(entry, "variants", []), getattr(entry, "vary", [])
    templates = [entry.text, *variants, *([entry.worse] if kind == "direction" else [])]
    slots = sorted({slot for template in templates for slot in SLOT.findall(template)})
    for slot in slots:
        if not words.get(slot):
            raise ValueError(
                f"{{{slot}}} has no words: add `{slot}: […]` under words.{entry.language} or to the entry's own words; "
                f"known here are {', '.join(sorted(words)) or 'none'}"
            )
    for slot in vary:
        if slot not in slots:
            raise ValueError(f"vary names {slot!r}, but the text has no {{{slot}}}: its slots are {slots}")
    if kind == "invariance" and not (entry.change or vary or variants):
        raise ValueError("nothing to compare with: give at least one of change, vary, variants")
    fixed = [slot for slot in slots if slot not in vary]
    fillings = [dict(zip(fixed, chosen)) for chosen in itertools.product(*(words[slot] for slot in fixed))]
    if len(fillings) > MOST:
        fillings = Random(entry.text).sample(fillings, MOST)
    cases = []
    for filling in fillings:
        varied = [dict(zip(vary, chosen)) for chosen in itertools.product(*(words[slot] for slot in vary))]
        texts = [fill(template, filling | varied[0]) for template in templates]
        texts += [fill(entry.text, filling | other) for other in varied[1:]]
        texts += [CHANGES[change](texts[0]) for change in getattr(entry, "change", [])]
        cases.append(Case(kind, entry.capability, entry.language, tuple(texts), getattr(entry, "toxic", None)))
    return cases


def fill(template: str, words: dict[str, str]) -> str:
    """The template with its slots replaced, its first letter a capital one, and `an` before a vowel."""
    text = re.sub(r"\ba (?=[aeiou])", "an ", SLOT.sub(lambda slot: words[slot[1]], template))
    return text[0].upper() + text[1:]


def typo(text: str) -> str:
    """Two neighbouring letters inside the longest word have changed places."""
    longest = max(re.findall(r"\w+", text), key=len)
    middle = len(longest) // 2
    return text.replace(longest, longest[: middle - 1] + longest[middle] + longest[middle - 1] + longest[middle + 1 :])


CHANGES = {
    "lower": str.lower,
    "upper": str.upper,
    "typo": typo,
    "emoji": lambda text: f"{text} 🙂",
    "no_punctuation": lambda text: re.sub(r"[^\w\s]", "", text),
    **{way: functools.partial(disguises.disguised, way=way) for way in disguises.WAYS},
}


# The verdict ----------------------------------------------------------------------------------------------------------


def check(cases: list[Case], probability_of_toxic, threshold: float) -> dict:
    """Which cases a model passes.

    Args:
        probability_of_toxic: a function from messages to float [N].
        threshold: from it on a message is toxic.

    Returns {"pass_rate", "cases": n, "kinds": {kind: pass rate}, "capabilities": [{kind, capability, language, cases,
    pass_rate}], "failed": [{kind, capability, language, toxic, scores: [[text, score]]}]}.
    """
    texts = sorted({text for case in cases for text in case.texts})
    score = dict(zip(texts, np.asarray(probability_of_toxic([clean(text) for text in texts])).tolist()))
    passed = [_passes(case, [score[text] for text in case.texts], threshold) for case in cases]
    groups = {}
    for case, ok in zip(cases, passed):
        groups.setdefault((case.kind, case.capability, case.language), []).append(ok)
    return {
        "pass_rate": float(np.mean(passed)),
        "cases": len(cases),
        "kinds": {
            kind: float(np.mean([ok for case, ok in zip(cases, passed) if case.kind == kind]))
            for kind in KINDS
            if any(case.kind == kind for case in cases)
        },
        "capabilities": [
            {
                "kind": kind,
                "capability": capability,
                "language": language,
                "cases": len(oks),
                "pass_rate": float(np.mean(oks)),
            }
            for (kind, capability, language), oks in groups.items()
        ],
        "failed": [
            {
                "kind": case.kind,
                "capability": case.capability,
                "language": case.language,
                "toxic": case.toxic,
                "scores": [[text, round(score[text], 3)] for text in case.texts],
            }
            for case, ok in zip(cases, passed)
            if not ok
        ],
    }


def _passes(case: Case, scores: list[float], threshold: float) -> bool:
    toxic = [score >= threshold for score in scores]
    if case.kind == "minimum":
        return toxic[0] == case.toxic
    if case.kind == "direction":
        return scores[1] >= scores[0]
    return len(set(toxic)) == 1
