"""Decide about a version that passed the gate, and record in the registry who decided, what, when and why."""

import getpass
import json
import logging
import os
from datetime import datetime, timezone

from tasks.config import Config
from tasks.errors import Skip, UsageError
from tasks.promotion import registry
from tasks.run import Run

log = logging.getLogger(__name__)


def run(config: Config, run: Run, decision=None, reviewer=None, reason=None) -> dict:
    """Takes the decision of a person (the arguments, or TOXIC_REVIEW from the review task), else that of the mode.

    Returns what was decided and which version was champion then: swap goes on only while it still is.

    Raises:
        Skip: rejected, or nobody has decided yet.
    """
    version = registry.candidate(config, run)
    if registry.tags(config, version).get("gate") != "passed":
        raise UsageError(
            f"version {version} has not passed the gate: only a version with the tag gate=passed is decided"
        )
    review = by_person(decision, reviewer, reason) or from_environment() or by_mode(config)
    result = {
        "version": version,
        "champion": registry.alias(config, "champion"),
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **review,
    }
    if review["decision"] is None:
        raise Skip(f"version {version} waits: {review['reason']}", **result)
    registry.tag(
        config,
        version,
        decision=review["decision"],
        decided_by=review["reviewer"],
        decided_at=result["at"],
        decided_why=review["reason"],
    )
    log.info("version %d: %s by %s (%s)", version, review["decision"], review["reviewer"], review["reason"])
    if review["decision"] == "reject":
        registry.tag(config, version, verdict="rejected")
        raise Skip(f"version {version} was rejected by {review['reviewer']}: {review['reason']}", **result)
    return result


def by_person(decision, reviewer, reason) -> dict | None:
    if decision is None:
        return None
    if decision not in ("approve", "reject"):
        raise UsageError(f"--decision={decision} is not one of approve, reject")
    return {"decision": decision, "reviewer": reviewer or getpass.getuser(), "reason": reason or "none given"}


def from_environment() -> dict | None:
    """The answer of the review task: TOXIC_REVIEW, a JSON object with decision, reviewer and reason."""
    text = os.environ.get("TOXIC_REVIEW")
    if not text:
        return None
    try:
        review = json.loads(text)
        return by_person(review["decision"], review["reviewer"], review["reason"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"TOXIC_REVIEW={text!r} is not a JSON object with decision, reviewer and reason") from None


def by_mode(config: Config) -> dict:
    """What promotion.mode says where no person has; on hold, `auto` waits like `review`."""
    hold, mode = registry.hold(config), config.promotion.mode
    if mode == "never":
        return {"decision": "reject", "reviewer": "auto", "reason": "promotion.mode=never"}
    if mode == "auto" and not hold:
        return {"decision": "approve", "reviewer": "auto", "reason": "promotion.mode=auto and the gate was passed"}
    why = f"automatic promotion is on hold ({hold})" if hold else "promotion.mode=review"
    return {
        "decision": None,
        "reviewer": "nobody",
        "reason": f'{why}; run `python commands.py decide --decision=approve --reason="…"`, or reject',
    }
