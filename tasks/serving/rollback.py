"""Put the previous champion back into service, and hold automatic promotion until a person clears it."""

import getpass
import logging
from datetime import datetime, timezone

from tasks.errors import StepFailed
from tasks.promotion import registry
from tasks.serving import repository, swap

log = logging.getLogger(__name__)


def run(overrides, reviewer, reason, config_path, config_name) -> dict:
    """Swaps the alias `previous` for the champion, in the server and in the registry.

    Returns {"served_version", "rolled_back_version", "swap_seconds"}.

    Raises:
        StepFailed: there is no previous version, or the live repository no longer keeps it.
    """
    from tasks.step import open_run

    _, config, _ = open_run("rollback", [str(o) for o in overrides], config_path, config_name)
    who, why = reviewer or getpass.getuser(), reason or "none given"
    with registry.lease(config, f"rollback by {who}"), swap.live_server(config) as server:
        swap.finish_or_undo(config, server)
        bad, target = registry.alias(config, "champion"), registry.alias(config, "previous")
        if target is None:
            raise StepFailed(
                "no version carries the alias `previous`: trigger toxicity_release for the version that shall serve"
            )
        live = repository.live(config)
        if target not in repository.installed(live):
            raise StepFailed(
                f"version {target} is no longer kept in {live}: trigger toxicity_release for version {target}"
            )
        repository.verify(live, target)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        tags = {bad: {"rolled_back_by": who, "rolled_back_because": why, "rolled_back_at": now}}
        # Without `previous`, a second rollback cannot bring the bad version back.
        seconds = swap.replace(config, server, target, {"previous": None, "champion": target}, tags)
        registry.set_hold(config, f"version {bad} was rolled back by {who}: {why}")
    log.info("version %d serves again, %d is tagged as rolled back", target, bad)
    return {"step": "rollback", "served_version": target, "rolled_back_version": bad, "swap_seconds": seconds}
