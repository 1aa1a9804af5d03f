"""Hold a version's figures against its limits: named checks, each with value, limit, verdict and a sentence."""

import getpass
import json
import logging
import operator
import os

from tasks.config import Config, Gate, PerBehaviour, in_words
from tasks.errors import Skip
from tasks.labels import TYPES
from tasks.promotion import in_service, registry
from tasks.promotion.limits import binding, for_a_person, tags_of
from tasks.run import Run

log = logging.getLogger(__name__)

FIGURES = {"f1_toxic": "F1 toxic", "f1_types": "F1 types"}
LANGUAGE_NAMES = {"en": "English", "ru": "Russian"}
NO_CHAMPION, NO_TYPES = "nothing is in service yet", "no test message has known types"
OVERRIDDEN = ("overrides", "overridden_by", "overridden_why")


def run(config: Config, run: Run) -> dict:
    """Judges the version, tags it, and makes it `challenger` when every check that binds is passed.

    Raises:
        Skip: a check that binds is missed; its result is the same dict.
        Unsigned: no step has written where the version comes from.
    """
    evaluated, version = run.result("evaluate"), registry.candidate(config, run)
    before = dict(registry.require_signed(config, version, but=("gate",)).tags)
    checks = judge(config, evaluated)
    compared = evaluated.get("in_service") or {}  # results of before it was looked for have none
    serving = in_service.warn(config)
    missed = [check for check in checks if mark(check) == "failed"]
    verdict = {
        "version": version,
        "champion": evaluated["champion_version"],
        "in_service": compared and compared | {"warning": serving and serving.warning},
        "passed": not missed,
        "missed": [check["name"] for check in missed],
        "warned": [check["name"] for check in checks if mark(check) == "warning"],
        "hold": registry.hold(config),
        "person": [
            *for_a_person(config, before | tags_of(config.gate)),
            *([compared["not_compared"]] if compared.get("not_compared") else []),
        ],
        "group": config.gate.group,
        "limits": binding(config.gate),
        "checks": checks,
        **overridden(config),
    }
    for check in checks:
        log.info("%s: %s", mark(check), check["sentence"])
    for why in verdict["person"]:
        log.warning("no mode puts version %d into service, a person decides: %s", version, why)
    tag(config, verdict, before)
    if missed:
        if registry.alias(config, "challenger") == version:  # under other limits it had passed
            registry.delete_alias(config, "challenger")
        sentences = "; ".join(check["sentence"] for check in missed)
        raise Skip(f"version {version}: {sentences}; see {run.folder / 'report.html'}", **verdict)
    registry.set_alias(config, "challenger", version)
    return verdict


def overridden(config: Config) -> dict:
    """The limits that are not the shipped ones, who changed them and why; in Airflow TOXIC_TRIGGERED_BY says who."""
    overrides = config.gate.overrides
    who = (os.environ.get("TOXIC_TRIGGERED_BY") or getpass.getuser()) if overrides else None
    why = config.gate.override_reason.strip() if overrides else None
    if overrides:
        log.warning("the gate was changed by %s (%s): %s", who, why, in_words(overrides))
    return {"overrides": overrides, "overridden_by": who, "overridden_why": why}


def record_overrides(config: Config, version: int, step: str) -> None:
    """Tags the version with the limits that another step than this one judges it by, where they are not the shipped;
    takes the tags of an earlier time away where they are."""
    tags = override_tags(overridden(config), step)
    registry.untag(config, version, *({f"{step}_{key}" for key in OVERRIDDEN} - tags.keys()))
    registry.tag(config, version, **tags)


def override_tags(found: dict, step: str) -> dict[str, str]:
    """What the registry keeps of `overridden`: nothing where the limits were the shipped ones."""
    if not found["overrides"]:
        return {}
    changed, *who_and_why = OVERRIDDEN
    return {f"{step}_{changed}": json.dumps(found[changed]), **{f"{step}_{key}": found[key] for key in who_and_why}}


def tag(config: Config, verdict: dict, before: dict[str, str]) -> None:
    """Writes the verdict to the version, in the place of what an earlier one of other limits has left there (`before`).

    `gate` goes first and comes last: a step that was killed between leaves no version that passed, but not by which
    limits. What a person decided later, or service came to, stays the version's final `verdict`.
    """
    version = verdict["version"]
    tags = {f"gate_{key}": ", ".join(verdict[key]) for key in ("missed", "warned") if verdict[key]}
    tags |= override_tags(verdict, "gate") | tags_of(config.gate)
    registry.withdraw(config, version, "gate")
    if before.get("verdict", "gate_failed") == "gate_failed":
        if verdict["passed"]:
            registry.withdraw(config, version, "verdict")
        else:
            registry.record(config, version, verdict="gate_failed")
    registry.record(config, version, **tags, gate="passed" if verdict["passed"] else "failed")


# The checks -----------------------------------------------------------------------------------------------------------


def judge(config: Config, evaluated: dict) -> list[dict]:
    """Every check of configs/gate on evaluate's result.

    Each is {group, name, title, value, limit, comparison, interval, binds, passed, sentence}; `interval` is the value's
    95 % interval or None. Where there is nothing to judge `passed` is None, and the sentence says why.
    """
    gate, challenger, champion = config.gate, evaluated["challenger"], evaluated["champion"]
    nobody = (evaluated.get("in_service") or {}).get("not_compared") or NO_CHAMPION
    return [
        *both_f1(gate, challenger),
        *gains_over_the_baseline(gate, evaluated["gain"]["baseline"]),
        *losses_to_the_champion(gate, evaluated["gain"].get("champion", {}), nobody),
        *languages(gate, challenger["languages"], champion["languages"] if champion else {}, nobody),
        *types(gate, challenger, champion["types"] if champion else {}, nobody),
        calibration(gate, challenger["calibration"]["ece"]),
        *behaviour(gate, evaluated["behaviour"]),
    ]


def both_f1(gate: Gate, challenger: dict) -> list[dict]:
    """Both F1, and the lower ends of their intervals: a figure that a lucky test split has lifted is not enough."""
    limits, checks = {"f1_toxic": gate.toxic, "f1_types": gate.types}, []
    for name, title in FIGURES.items():
        value, interval = challenger[name], challenger["intervals"][name]
        checks.append(check("f1", name, title, value, ">=", limits[name].min, limits[name].binds, interval))
    for name, title in FIGURES.items():
        title, limit = f"{title}, lower end at 95 %", limits[name].min - gate.interval.below
        low = challenger["intervals"][name][0]
        checks.append(check("f1", f"interval_{name}", title, low, ">=", limit, gate.interval.binds))
    return checks


def gains_over_the_baseline(gate: Gate, gain: dict) -> list[dict]:
    checks, limit = [], gate.min_gain_over_baseline
    for name, words in FIGURES.items():
        title, of = f"Gain in {words} over the baseline, lower end at 95 %", gain[name]
        interval = of and of["interval"]
        low = of and interval[0]
        checks.append(check("baseline", f"gain_{name}", title, low, ">", limit.min, limit.binds, interval, NO_TYPES))
    return checks


def losses_to_the_champion(gate: Gate, gain: dict, nobody: str = NO_CHAMPION) -> list[dict]:
    """Neither F1 is worse than the champion's on the same messages, as far as these messages can tell.

    A check is missed where the loss is larger than the tolerance, and larger than chance explains: the one-sided 95 %
    upper bound of the difference, from a paired bootstrap, is below 0. Both in one limit: the difference is at least
    minus the larger of the tolerance and its distance to that bound.

    About one in twenty models that are as good as the champion is stopped so. To demand proof that it is not worse, a
    lower bound above minus the tolerance, would stop most of them for nothing: on a few thousand messages the standard
    error of a difference of F1 is about the tolerance itself. To stop only what is proved to be worse by more than the
    tolerance, an upper bound below minus the tolerance, would let most losses of 0.01 through.
    """
    checks = []
    for name, words in FIGURES.items():
        value = limit = interval = None
        note = ""
        if of := gain.get(name):
            value, interval, upper = of["gain"], of["interval"], of["upper"]
            limit = -max(gate.champion.tolerance, upper - value)
            note = f" (with 95 % confidence it is {upper:.3f} at most)"
        why = NO_TYPES if gain else nobody
        title = f"{words} less the champion's"
        found = check("champion", f"champion_{name}", title, value, ">=", limit, gate.champion.binds, interval, why)
        checks.append(found | {"sentence": found["sentence"] + note})
    return checks


def languages(gate: Gate, ours: dict, theirs: dict, nobody: str = NO_CHAMPION) -> list[dict]:
    checks = []
    for name, words in LANGUAGE_NAMES.items():
        limits, why = getattr(gate.per_language, name), f"the test split has no message in {words}"
        of, other = ours.get(name), theirs.get(name)
        title = f"F1 toxic in {words}"
        checks += slice_checks("languages", f"language_{name}", title, of, other, "f1_toxic", limits, why, nobody)
    return checks


def types(gate: Gate, challenger: dict, theirs: dict, nobody: str = NO_CHAMPION) -> list[dict]:
    """Each type on its own, where there are enough positives for its F1 to mean something."""
    checks = []
    for name in TYPES:
        of, limits, why = challenger["types"][name], getattr(gate.per_type, name), ""
        if of["support"] < gate.min_positives:
            why = f"{of['support']} positives in the test split, {gate.min_positives} are asked for"
        of = None if why else of | {"interval": challenger["intervals"][name]}
        other = theirs.get(name)
        checks += slice_checks("types", f"type_{name}", f"F1 {name}", of, other, "f1", limits, why, nobody)
    return checks


def slice_checks(group, name, title, ours, theirs, figure, limits, why, nobody) -> list[dict]:
    """A slice's F1 against its floor and the champion's; `ours` is None where, as `why` says, it isn't judged, and
    `nobody` says why there is no champion to compare with."""
    value, interval = (ours[figure], ours["interval"]) if ours else (None, None)
    difference = ours[figure] - theirs[figure] if ours and theirs else None
    against, why_not = f"{title} less the champion's", nobody if ours else why
    floor, loss = limits.floor, limits.loss
    return [
        check(group, name, title, value, ">=", floor.min, floor.binds, interval, why),
        check(group, f"{name}_champion", against, difference, ">=", -loss.max, loss.binds, None, why_not),
    ]


def calibration(gate: Gate, ece: float) -> dict:
    limit = gate.calibration
    return check("calibration", "calibration", "Calibration error", ece, "<=", limit.max_ece, limit.binds)


def behaviour(gate: Gate, found: dict) -> list[dict]:
    """Pass rates of all behavioural checks, and of each kind that has any."""
    title, group, limit = "Share of behavioural checks passed", "behaviour", gate.behaviour
    checks = [check(group, "behaviour", title, found["pass_rate"], ">=", limit.min, limit.binds)]
    for kind in PerBehaviour.model_fields:
        value, limit, why = found["kinds"].get(kind), getattr(gate.per_behaviour, kind), f"there is no check of {kind}"
        checks.append(
            check(group, f"behaviour_{kind}", f"{title}, {kind}", value, ">=", limit.min, limit.binds, None, why)
        )
    return checks


# One check ------------------------------------------------------------------------------------------------------------

# How a value that passes compares with its limit, and what is said of one that doesn't.
COMPARISONS = {">=": (operator.ge, "below"), ">": (operator.gt, "not above"), "<=": (operator.le, "above")}


def check(group, name, title, value, comparison, limit, binds, interval=None, why="") -> dict:
    """One check; `value` is None where, as `why` says, there is nothing to judge."""
    found = {"group": group, "name": name, "title": title, "value": value, "limit": limit, "comparison": comparison}
    found |= {"interval": interval, "binds": binds}
    if value is None:
        return {**found, "passed": None, "sentence": f"{title}: does not apply, {why}"}
    holds, otherwise = COMPARISONS[comparison]
    passed, (shown, at) = bool(holds(value, limit)), told_apart(value, limit)
    return {
        **found,
        "passed": passed,
        "sentence": f"{title} {shown} {f'meets {at}' if passed else f'is {otherwise} {at}'}",
    }


def told_apart(value: float, limit: float) -> tuple[str, str]:
    """Both with three decimals, or as many more as it takes to see that they differ."""
    for digits in range(3, 9):
        shown = f"{value:.{digits}f}", f"{limit:.{digits}f}"
        if value == limit or shown[0] != shown[1]:
            break
    return shown


def mark(check: dict) -> str:
    """One word for what a check came to: passed, failed, warning or n/a."""
    if check["passed"] is None:
        return "n/a"
    return "passed" if check["passed"] else "failed" if check["binds"] else "warning"
