"""See and clear the hold that a rollback has put on automatic promotion."""

import getpass
import logging

from tasks.errors import UsageError
from tasks.promotion import registry

log = logging.getLogger(__name__)


def run(overrides, clear, reviewer, reason, config_path, config_name) -> dict:
    """Returns {"hold": why automatic promotion waits for a person, or None}, and "cleared": what a hold was for.

    Raises:
        UsageError: a reason for clearing without --clear.
    """
    from tasks.step import without_a_run

    if not isinstance(clear, bool):
        raise UsageError(f"--clear={clear}: it takes no value; put it after the overrides")
    if (reviewer or reason) and not clear:
        raise UsageError("--reason and --reviewer go with --clear")
    config = without_a_run(overrides, config_path, config_name)
    if not clear:
        return {"step": "hold", "hold": registry.hold(config)}
    who, why = reviewer or getpass.getuser(), reason or "none given"
    cleared = registry.clear_hold(config, who, why)
    if cleared:
        log.info("%s cleared the hold (%s): %s", who, cleared, why)
    else:
        log.info("there is no hold to clear")
    return {"step": "hold", "hold": None, "cleared": cleared}
