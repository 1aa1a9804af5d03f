"""Decide about a version that passed the gate, and record in the registry who decided, what, when and why."""

import getpass
import json
import logging
import os

from tasks.config import Config
from tasks.errors import Skip, UsageError
from tasks.promotion import in_service, limits, registry
from tasks.run import Run

log = logging.getLogger(__name__)

TIMED_OUT = "timed_out"  # the reason of a rejection that nobody has spoken
NO_REASON = "none given"


def run(config: Config, run: Run, decision=None, reviewer=None, reason=None) -> dict:
    """Takes the decision of a person (the arguments, or TOXIC_REVIEW from the review task), else that of the mode.

    What the review task said for the mode is asked anew: a rollback may have set a hold since.

    Returns what was decided, which champion the version was compared with (swap goes on only while it still is), and
    `person`, why no mode may decide for this version: see `limits.for_a_person`.

    Raises:
        Skip: rejected, or nobody has decided yet; or rejected, but in service since it was released from the registry.
        StepFailed: approved, but another version has become champion since the comparison, or this one was rolled back.
        UsageError: approved, but it has not passed the gate, or another model serves under its number.
        Unsigned: no step has written what the registry says of the version.
    """
    version = registry.candidate(config, run)
    tags = dict(registry.require_signed(config, version).tags)
    release = config.release.version is not None  # nothing was compared then; the person knows what serves now
    # A release is judged anew, by the limits of its own configuration.
    person = limits.for_a_person(config, tags | limits.tags_of(config.gate) if release else tags)
    review = by_person(decision, reviewer, reason) or from_environment() or by_mode(config, tags, person)
    missed = missed_by(tags, release)
    if missed and not (release and review["reason"] != NO_REASON):
        raise UsageError(
            f"version {version} has not passed the gate ({missed}): only toxicity_release puts it into service, with a "
            "reason, which the registry keeps; what the steps after this one check binds all the same"
        )
    champion = in_service.champion(config) if release else run.result("gate")["champion"]
    result = {"version": version, "champion": champion, "at": registry.now(), "person": person, **review}
    if review["decision"] is None:
        raise Skip(f"version {version} waits: {review['reason']}", **result)
    if review["decision"] == "reject" and version == in_service.champion(config):
        way_out = 'to take it out again, run `python commands.py rollback --reason="…"`'
        raise Skip(
            f"version {version} was released meanwhile and is in service: nothing is recorded; {way_out}", **result
        )
    if review["decision"] == "approve":
        in_service.require_own_number(config, version)
        in_service.require_champion(config, version, champion)
        if not release:
            registry.require_not_rolled_back(config, version, since=tags.get("served_at", ""))
    record(config, result, release, missed, tags)
    if review["decision"] == "reject":
        raise Skip(f"version {version} was rejected by {review['reviewer']}: {review['reason']}", **result)
    return result


def missed_by(tags: dict[str, str], release: bool) -> str | None:
    """What of the gate speaks against a version: the checks it missed, or that there was no gate; None: nothing.

    Where a version that has served is released again, limits that it was held against later don't bar its way back.
    """
    if tags.get("gate") == "passed" or release and "served_at" in tags:
        return None
    return tags.get("gate_missed", "it was never judged")


def record(config: Config, result: dict, release: bool, missed: str | None, before: dict[str, str]) -> None:
    """Tags the version with the decision. That of a release stands beside the one that its review came to.

    A rejection is the final verdict on this fingerprint of data, config and code. It is written last: a step that was
    killed before decides again.
    """
    version, decision, who, why = (result[key] for key in ("version", "decision", "reviewer", "reason"))
    log.info("version %d: %s by %s (%s)", version, decision, who, why)
    for difference in result["person"]:
        log.warning("version %d: %s", version, difference)
    if release and decision == "approve":
        despite = {"released_despite": missed} if missed else {}
        registry.record(config, version, **despite, released_by=who, released_at=result["at"], released_why=why)
        return
    registry.record(config, version, decision=decision, decided_by=who, decided_at=result["at"], decided_why=why)
    if decision == "reject" and before.get("verdict") != "promoted":
        registry.record(config, version, verdict=TIMED_OUT if why == TIMED_OUT else "rejected")


def by_person(decision, reviewer, reason) -> dict | None:
    if decision is None:
        return None
    if decision not in ("approve", "reject"):
        raise UsageError(f"--decision={decision} is not one of approve, reject")
    return {"decision": decision, "reviewer": reviewer or getpass.getuser(), "reason": reason or NO_REASON}


def from_environment() -> dict | None:
    """The answer of the review task: TOXIC_REVIEW, a JSON object with decision, reviewer and reason, or None.

    With `by_mode` it is no person's, and the mode is asked anew.
    """
    text = os.environ.get("TOXIC_REVIEW")
    if not text:
        return None
    try:
        review = json.loads(text)
        return None if review.get("by_mode") else by_person(review["decision"], review["reviewer"], review["reason"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"TOXIC_REVIEW={text!r} is not a JSON object with decision, reviewer and reason") from None


def by_mode(config: Config, tags: dict[str, str], person: list[str]) -> dict:
    """What promotion.mode says where no person has; on hold, `auto` waits like `review`.

    It never speaks for a version from the registry, nor against the rejection of one, nor puts into service what, as
    `person` says, only a person may.
    """
    hold, mode = registry.hold(config), config.promotion.mode
    if config.release.version is not None or tags.get("decision") == "reject":
        why = f"a person decides about a version that is {tags.get('verdict', 'in the registry')}"
    elif mode == "never":
        return {"decision": "reject", "reviewer": "auto", "by_mode": True, "reason": "promotion.mode=never"}
    elif person:
        why = f"a person decides, since {'; '.join(person)}"
    elif mode == "auto" and not hold:
        why = "promotion.mode=auto and the gate was passed"
        return {"decision": "approve", "reviewer": "auto", "by_mode": True, "reason": why}
    else:
        why = f"automatic promotion is on hold ({hold})" if hold else "promotion.mode=review"
    return {
        "decision": None,
        "reviewer": "nobody",
        "reason": f'{why}; run `python commands.py decide --decision=approve --reason="…"`, or reject',
    }
