"""Put the version that served before back into service, and hold automatic promotion until a person clears it."""

import getpass
import logging
from pathlib import Path

from tasks.config import Config
from tasks.errors import StepFailed
from tasks.promotion import in_service, registry, signatures
from tasks.serving import exchange, live_servers, repository, swap

log = logging.getLogger(__name__)


def run(overrides, reviewer, reason, config_path, config_name) -> dict:
    """Swaps the version that served last, among those not known to be bad, for the champion: in server and registry.

    A rollback that was killed after its commit is finished, and is not followed by a second one.

    Returns {"served_version", "rolled_back_version", "swap_seconds"}; seconds are None where it was only finished.

    Raises:
        StepFailed: nothing is in service, no other version is left to go back to, or the live repository has lost it;
            or a server can not have both loaded.
        Unsigned: no step has written what the registry says of any version that it could go back to.
    """
    from tasks.step import without_a_run

    config = without_a_run(overrides, config_path, config_name)
    signatures.signing_key(config.workspace)  # now, not when the version before has been switched to
    who, why = reviewer or getpass.getuser(), reason or "none given"
    with registry.lease(config, f"rollback by {who}") as still_mine, live_servers.connect(config) as servers:
        finished = exchange.finish_or_undo(config, servers)
        if finished and finished["hold"]:
            bad, target, seconds = finished["from"], finished["to"], None
        else:
            serving = in_service.repair(config)
            target = choose(config, serving)
            bad = serving.number
            exchange.require_fit_beside(config, servers, target, exchange.classifier(config, target))
            change = swap.going_back(config, serving.version, target, who, why, bad)
            seconds = exchange.replace(config, servers, still_mine, target, **change)
    log.info("version %d serves again, %d is tagged as rolled back", target, bad)
    return {"step": "rollback", "served_version": target, "rolled_back_version": bad, "swap_seconds": seconds}


def choose(config: Config, serving: in_service.Serving | None) -> int:
    """The version to go back to: installed in the live repository, whole, signed, and the last to serve before this
    one."""
    live = repository.live(config)
    if serving is None:
        raise StepFailed("no version is in service, so there is nothing to roll back")
    before = [version for version in registry.history(config) if version != serving.number]
    there = [version for version in before if version in repository.installed(live)]
    if not there:
        raise StepFailed(nothing_left(serving, [number for number in serving.history if number in before], live))
    wrong = {
        number: signatures.problem(config.workspace, registry.version(config, number), ("swap",)) for number in there
    }
    good = [number for number in there if wrong[number] is None]
    if not good:
        raise signatures.Unsigned(wrong[there[0]])
    for number in there[: there.index(good[0])]:
        log.warning("%s", wrong[number])
    repository.verify(live, good[0])
    return good[0]


def nothing_left(serving: in_service.Serving, before: list[int], live: Path) -> str:
    champion, wrong = serving.number, ""
    if serving.warning and serving.version is not None and serving.on_disk:
        wrong = f"{serving} serves and had lost its alias champion to a hand in MLflow, which is set again; "
    elif serving.warning:
        wrong = f"{serving.warning}; "
    if before:
        return (
            f"{wrong}version {before[0]} served before {champion}, but {live} no longer keeps it: trigger "
            f"toxicity_release for version {before[0]}"
        )
    return (
        f"{wrong}no version served before {champion} that is not tagged as rolled back: trigger toxicity_release for "
        "the version that shall serve"
    )
