"""Hold a version's figures against its limits: named checks, each with value, limit, verdict and a sentence."""

import logging
import operator

from tasks.config import Config
from tasks.errors import Skip
from tasks.labels import LANGUAGES
from tasks.promotion import registry
from tasks.run import Run

log = logging.getLogger(__name__)

FIGURES = {"f1_toxic": "F1 toxic", "f1_types": "F1 types"}
LANGUAGE_NAMES = {"en": "English", "ru": "Russian"}


def run(config: Config, run: Run) -> dict:
    """Judges the version, tags it, and makes it `challenger` when every check that binds is passed.

    Raises:
        Skip: a check that binds is missed; its result is the same dict.
    """
    evaluated, version = run.result("evaluate"), registry.candidate(config, run)
    checks = judge(config, evaluated)
    missed = [check for check in checks if check["binds"] and check["passed"] is False]
    verdict = {
        "version": version,
        "champion": evaluated["champion_version"],
        "passed": not missed,
        "hold": registry.hold(config),
        "checks": checks,
    }
    for check in checks:
        log.info("%s: %s", mark(check), check["sentence"])
    if missed:
        registry.tag(config, version, gate="failed", verdict="gate_failed")
        sentences = "; ".join(check["sentence"] for check in missed)
        raise Skip(f"version {version}: {sentences}; see {run.folder / 'report.html'}", **verdict)
    registry.tag(config, version, gate="passed")
    registry.set_alias(config, "challenger", version)
    return verdict


def judge(config: Config, evaluated: dict) -> list[dict]:
    """Every check of configs/gate on evaluate's result; `passed` is None where there is nothing to compare with."""
    gate, challenger, champion = config.gate, evaluated["challenger"], evaluated["champion"]
    checks = [
        at_least("f1_toxic", "F1 toxic", challenger["f1_toxic"], gate.toxic.min, gate.toxic.binds),
        at_least("f1_types", "F1 types", challenger["f1_types"], gate.types.min, gate.types.binds),
    ]
    for figure, words in FIGURES.items():
        gain = evaluated["gain"]["baseline"][figure]
        lower = gain and gain["interval"][0]
        words = f"Gain in {words} over the baseline, lower end at 95 %"
        limit = gate.min_gain_over_baseline
        checks.append(above(f"gain_{figure}", words, lower, limit.min, limit.binds))
    for figure, words in FIGURES.items():
        limit = champion and champion[figure] - gate.champion.tolerance
        words = f"{words} against the champion's"
        checks.append(at_least(f"champion_{figure}", words, challenger[figure], limit, gate.champion.binds))
    for language in LANGUAGES:
        value = challenger["languages"].get(language, {}).get("f1_toxic")
        words = f"F1 toxic in {LANGUAGE_NAMES[language]}"
        checks.append(at_least(f"language_{language}", words, value, gate.language.min, gate.language.binds))
    ece = challenger["calibration"]["ece"]
    checks.append(at_most("calibration", "Calibration error", ece, gate.calibration.max_ece, gate.calibration.binds))
    rate = evaluated["behaviour"]["pass_rate"]
    words = "Share of behavioural checks passed"
    checks.append(at_least("behaviour", words, rate, gate.behaviour.min, gate.behaviour.binds))
    return checks


def at_least(name: str, words: str, value: float | None, limit: float | None, binds: bool) -> dict:
    return _check(name, words, value, limit, binds, ">=", "below")


def above(name: str, words: str, value: float | None, limit: float | None, binds: bool) -> dict:
    return _check(name, words, value, limit, binds, ">", "not above")


def at_most(name: str, words: str, value: float | None, limit: float | None, binds: bool) -> dict:
    return _check(name, words, value, limit, binds, "<=", "above")


HOLDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le}


def _check(name, words, value, limit, binds, comparison, wrong_side) -> dict:
    check = {"name": name, "title": words, "value": value, "limit": limit, "comparison": comparison, "binds": binds}
    if value is None or limit is None:
        return {**check, "passed": None, "sentence": f"{words}: does not apply, there is nothing to compare with"}
    passed = bool(HOLDS[comparison](value, limit))
    relation = f"meets {limit:.3f}" if passed else f"is {wrong_side} {limit:.3f}"
    return {**check, "passed": passed, "sentence": f"{words} {value:.3f} {relation}"}


def mark(check: dict) -> str:
    """One word for what a check came to: passed, failed, warning or n/a."""
    if check["passed"] is None:
        return "n/a"
    return "passed" if check["passed"] else "failed" if check["binds"] else "warning"
