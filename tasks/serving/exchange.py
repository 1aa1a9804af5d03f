"""Exchange the version in service for another that is installed, in all live servers and the registry, or in none.

The new version is loaded beside the old one and asked some messages whose answers are known. Then the ensemble is tied
to it, which is the switch: requests under way end on the old version, all others go to the new one. What a version
brings goes over as a whole, its tokenizer too. Where memory allows, the old one stays loaded: going back is a switch.

Several servers share one live repository. Each in turn proves the new version before the first is switched. A journal
says what has been begun: who is killed in between leaves it to the next one, who finishes or undoes that.
"""

import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from tasks import files
from tasks.config import Config
from tasks.errors import StepFailed
from tasks.promotion import in_service, registry
from tasks.serving import build_engine, live_servers, memory, repository

log = logging.getLogger(__name__)


def journal_file(config: Config) -> Path:
    return config.workspace / "triton" / "swap.json"


def renewal_file(config: Config) -> Path:
    """There from before the champion's files are replaced until every server has loaded them: without it, a second try
    would see whole files and a server that answers from memory, and take that for the end."""
    return config.workspace / "triton" / "renewal.json"


def replace(
    config: Config, servers: dict, still_mine, version: int, aliases: dict, tags: dict, hold: str | None = None
) -> float:
    """Puts an installed version into service in the place of the one that serves; returns the seconds it took.

    Args:
        servers: as from live_servers.connect.
        still_mine: called before each part of the commit; raises LeaseLost where another changes what serves by now.
        aliases: registry aliases, and the version each shall name (None: no version), the champion last.
        tags: registry version → tags it gets.
        hold: why automatic promotion waits for a person from now on, or None.

    Raises:
        StepFailed: it did not work; what served before serves again. Or it did, and the registry knows only in part:
            the next swap or rollback finishes that. LeaseLost: all is left as it is to that next one.
    """
    started = time.monotonic()
    if hold:  # first: one that a killed rollback leaves behind only asks for a person, one that it lacks asks nobody
        registry.set_hold(config, hold)
    config = as_installed(config, version)
    try:
        journal = begin(config, servers, version, aliases, tags, hold)
    except Exception as error:
        put_back(config)
        discard(config, version)
        raise StepFailed(f"version {version} is not put into service, what serves goes on: {error}") from error
    try:
        for server in servers.values():
            load_beside(config, server, journal)
            try_out(config, server, version)
        switch(config, servers, still_mine, version)
        still_mine()
        set_aliases(config, aliases)
    except registry.LeaseLost:
        raise  # an undo now would undo what the other does
    except BaseException as error:
        reason = " ".join(str(error).split())
        log.error("version %d is not put into service: %s", version, reason)
        require_still_mine(still_mine)
        problems = undo(config, servers, journal, reason or type(error).__name__)
        if not isinstance(error, Exception):
            raise
        raise StepFailed(
            f"version {version} is not put into service, {journal['from'] or 'none'} serves as before: {reason}"
            + (f"; but not all could be undone: {'; '.join(problems)}" if problems else "")
        ) from error
    try:
        finish(config, servers, journal)
    except Exception as error:
        raise StepFailed(
            f"version {version} is in service, but not all that follows is done, so run the same command again: "
            + " ".join(str(error).split())
        ) from error
    return round(time.monotonic() - started, 3)


def require_still_mine(still_mine) -> None:
    """Raises LeaseLost where another changes what serves by now; where the registry does not answer, nobody does."""
    try:
        still_mine()
    except registry.LeaseLost:
        raise
    except Exception as error:
        log.warning("whether the lease is still held is not known: %s", error)


def require_fit_beside(config: Config, servers: dict, version: int, engine: Path) -> None:
    """Raises StepFailed where a server could not have both loaded, the version and the one in service. To be called
    before anything changes: a server reads both from disk, also the one that it has in memory.

    Args:
        engine: the folder with the version's engine.json.
    """
    old = repository.served(repository.live(config))
    serving = [url for url, server in servers.items() if old and live_servers.has_loaded(server, old)]
    if not serving or old == version:
        return
    refused = f"version {version} is not put into service, what serves goes on:"
    if problem := repository.damage(repository.live(config), old):
        raise StepFailed(
            f"{refused} {serving[0]} answers from memory as version {old}, which it could not load again: {problem}; "
            "or start the server again, which then serves nothing until this command is run again"
        )
    try:
        repository.for_both(config, classifier(config, old), engine)
    except StepFailed as error:
        raise StepFailed(f"{refused} {error}") from None
    before, after = (files.read_json(folder / "engine.json") for folder in (classifier(config, old), engine))
    if not build_engine.fit_alike(before, after):  # what the server itself says of such a plan names neither
        raise StepFailed(
            f"{refused} it was built with {build_engine.in_words(after)}, but {serving[0]} serves version {old}, "
            f"built with {build_engine.in_words(before)}: trigger toxicity_release for version {version}, which builds "
            "it anew; or where the Triton image has changed, start the server from it first"
        )


def begin(config: Config, servers: dict, version: int, aliases: dict, tags: dict, hold: str | None) -> dict:
    """Writes the journal, from which whoever comes next can finish or undo what a killed process has begun."""
    live = repository.live(config)
    repository.create(config, live)
    old = repository.served(live)
    unload_others(config, servers, {old, version})
    engine = repository.engine(live, version)["sha256"]  # by which the version is known while it serves
    serves = {"served_at": registry.now(), **tags.get(version, {}), in_service.SERVED: engine}
    journal = {
        "from": old,
        "serving": [url for url, server in servers.items() if old and live_servers.has_loaded(server, old)],
        "to": version,
        "started_at": registry.now(),
        "configs": {m: repository.config_file(live, m).read_text() for m in (*repository.PARTS, repository.TEXT)},
        "aliases": aliases,
        "aliases_before": {name: registry.alias(config, name) for name in aliases},
        "tags": {**tags, version: serves},
        "hold": hold,  # says that it is a rollback
    }
    files.write_json(journal_file(config), journal)
    return journal


def unload_others(config: Config, servers: dict, keep: set[int | None]) -> None:
    """Lets go of the version before the one that serves, where it was kept: there is room for two, not for three."""
    live = repository.live(config)
    for part in repository.PARTS:
        wanted = repository.read(repository.config_file(live, part))
        loaded = list(wanted.version_policy.specific.versions)
        kept = [version for version in loaded if version in keep]
        if kept and kept != loaded:
            wanted.version_policy.specific.versions[:] = kept
            for server in servers.values():
                if all(live_servers.is_ready(server, part, version) for version in kept):
                    live_servers.load(config, server, wanted)
            repository.write(live, wanted)


def versions_during(journal: dict) -> list[int]:
    """What is loaded between the start and the end of a swap; a version that loaded nowhere is not waited for."""
    return sorted({journal["to"], *([journal["from"]] if journal["serving"] else [])})


def load_beside(config: Config, server, journal: dict) -> None:
    """Loads the new version's parts while the old one goes on serving.

    Each is written down as soon as it has loaded: with an ensemble a server reads its parts' configurations again.
    """
    if journal["serving"]:
        config = repository.for_both(config, classifier(config, journal["from"]), classifier(config, journal["to"]))
    for part in repository.PARTS:
        wanted = repository.part_config(config, part, versions_during(journal))
        live_servers.load(config, server, wanted)
        repository.write(repository.live(config), wanted)


def try_out(config: Config, server, version: int) -> None:
    """Asks the loaded version its golden messages, through an ensemble that no client knows."""
    live_servers.load(config, server, repository.text_config(config, version, repository.TRIAL))
    live_servers.confirm(config, server, version, repository.TRIAL)
    server.unload_model(repository.TRIAL, client_timeout=config.serving.load_timeout_s)


def switch(config: Config, servers: dict, still_mine, version: int) -> None:
    """Ties the ensemble to a version, sees it answer, and only then writes it down: the commit."""
    wanted = repository.text_config(config, version)
    for server in servers.values():
        still_mine()
        live_servers.load(config, server, wanted)
        live_servers.confirm(config, server, version, repository.TEXT)
    still_mine()
    repository.write(repository.live(config), wanted)


def set_aliases(config: Config, aliases: dict) -> None:
    """Has each alias name its version; that of one which a hand has deleted meanwhile is removed."""
    for name, version in aliases.items():
        if version is not None and registry.exists(config, version):
            registry.set_alias(config, name, version)
        elif registry.alias(config, name) is not None:
            registry.delete_alias(config, name)


def finish(config: Config, servers: dict, journal: dict) -> None:
    """What follows a commit: the old version leaves memory, or stays for a quick way back; the registry learns it."""
    live, version = repository.live(config), journal["to"]
    try:
        kept = let_go(config, servers, journal)
    except Exception as error:
        if not is_gone(config, servers.values(), version):
            raise
        log.error("version %d is in service, but loads no more, so release it anew, or another: %s", version, error)
        kept = []
    for tagged, values in journal["tags"].items():
        if registry.exists(config, int(tagged)):  # else a hand has deleted it meanwhile, which must not keep us
            registry.record(config, int(tagged), **values)
    if registry.exists(config, version):
        registry.untag(config, version, "swap_failed_because", "swap_failed_at")
    repository.prune(live, [*kept, *registry.history(config)])
    renewal_file(config).unlink(missing_ok=True)  # of a version that serves no more
    if aside(config).exists():
        shutil.rmtree(aside(config))
    journal_file(config).unlink()
    log.info("version %d is in service%s", version, f", {kept[0]} stays loaded" if kept else "")


def let_go(config: Config, servers: dict, journal: dict) -> list[int]:
    """Has all servers serve the new version, and what stays loaded of the old one; returns that: a version, or none."""
    live, version = repository.live(config), journal["to"]
    config = as_installed(config, version)
    kept = [journal["from"]] if keeps_previous(config, servers, journal) else []
    for server in servers.values():  # one may have started again since the switch
        live_servers.load(config, server, repository.text_config(config, version))
    for part in repository.PARTS:
        wanted = repository.part_config(config, part, sorted([*kept, version]))
        for url, server in servers.items():
            live_servers.load(config, server, wanted)
            require_unloaded(url, server, part, set(repository.installed(live)) - {version, *kept})
        repository.write(live, wanted)
    return kept


def keeps_previous(config: Config, servers: dict, journal: dict) -> bool:
    """Whether the version that served stays loaded: a good one, where configuration and memory allow.

    Only an older one: a request to a part that names no version is answered by the highest that is loaded.
    """
    old, setting = journal["from"], config.serving.keep_previous_loaded
    if setting is False or journal["hold"] or old is None or old >= journal["to"]:
        return False
    if not all(live_servers.has_loaded(server, old) for server in servers.values()):
        return False
    return setting is True or all(has_room(config, url, journal["to"]) for url in servers)


def has_room(config: Config, url: str, version: int) -> bool:
    """Whether a server with two versions loaded leaves enough memory to stage a third, and the headroom."""
    address = f"http://{url.rpartition(':')[0]}:{config.serving.metrics_port}/metrics"
    free = memory.free_by_metrics(config, address)
    if free is None:
        return False
    needed = memory.needed(config, classifier(config, version))
    return free >= needed + config.serving.memory_headroom_gib * memory.GIB


def require_unloaded(url: str, server, part: str, versions: set[int]) -> None:
    for version in versions:
        if live_servers.is_ready(server, part, version):
            raise StepFailed(f"{part} version {version} is still loaded at {url}: run the same command again")


def undo(config: Config, servers: dict, journal: dict, reason: str) -> list[str]:
    """Everything as it was before; returns what is not.

    What cannot be reached now is left to the next swap or rollback, by the journal; what loads no more (see is_gone)
    is given up.
    """
    problems, lost, reached = [], {}, dict(servers)
    try:
        put_back(config)
    except OSError as error:
        problems.append(str(error))
    # The ensemble first, everywhere: with it a server reads its parts' configurations, and would let go of the version
    # that it still asks. A server that is away must not keep the others from going back.
    for models in ((repository.TEXT,), repository.PARTS):
        for model in models:
            files.write_text(repository.config_file(repository.live(config), model), journal["configs"][model])
        for url, server in list(reached.items()):
            try:
                restore(config, server, models, journal)
            except StepFailed as error:
                if url in journal["serving"]:
                    lost[url] = f"{url} {error}"
            except Exception as error:
                problems.append(f"{url}: {error}")
                del reached[url]
    try:
        set_aliases(config, journal["aliases_before"])
        if registry.exists(config, journal["to"]):
            registry.tag(config, journal["to"], swap_failed_because=reason[:5000], swap_failed_at=registry.now())
    except Exception as error:
        problems.append(str(error))
    for sentence in lost.values():
        log.error(sentence)
    if problems:
        log.error("not all could be undone, the next swap or rollback tries again: %s", "; ".join(problems))
    else:
        journal_file(config).unlink()
        discard(config, journal["to"])
    return [*lost.values(), *problems]


def restore(config: Config, server, models: tuple[str, ...], journal: dict) -> None:
    """Has a server read models' configurations on disk again, or forget the models if nothing was in service.

    Raises:
        StepFailed: what served before does not load there any more, however often it is tried.
    """
    from tritonclient.utils import InferenceServerException

    timeout_s, old = config.serving.load_timeout_s, journal["from"]
    server.unload_model(repository.TRIAL, client_timeout=timeout_s)
    for model in models:
        if old is None:
            server.unload_model(model, client_timeout=timeout_s)
            continue
        try:
            server.load_model(model, client_timeout=timeout_s)
        except InferenceServerException as error:
            if not is_gone(config, [server], old):
                raise
            raise StepFailed(
                f"does not load version {old} any more: {error.message()}; release version {old} anew, or another"
            ) from None


def is_gone(config: Config, servers: Iterable, version: int) -> bool:
    """Whether it is of no use to load again a version that has just failed to: a server does not have it, or has it in
    memory alone. A journal that waited for it would stand in the way of all that can repair it, a release for one.

    Raises:
        InferenceServerException: a server does not answer, so that nobody knows.
    """
    loaded = [live_servers.has_loaded(server, version) for server in servers]
    return not all(loaded) or repository.damage(repository.live(config), version) is not None


def finish_or_undo(config: Config, servers: dict) -> dict | None:
    """Ends a swap or rollback that was killed: finished if it had committed, else undone.

    Returns the journal of one that it has finished, else None.

    Raises:
        StepFailed: neither works now.
    """
    if not journal_file(config).exists():
        put_back(config)  # of a swap that was killed before it had begun its journal
        return None
    journal = files.read_json(journal_file(config))
    committed = repository.served(repository.live(config)) == journal["to"]
    log.warning("%s the killed swap to version %d", "finishing" if committed else "undoing", journal["to"])
    if committed:
        set_aliases(config, journal["aliases"])
        finish(config, servers, journal)
        return journal
    problems = undo(config, servers, journal, "the process was killed before the commit")
    if journal_file(config).exists():
        raise StepFailed(
            f"the swap to version {journal['to']} that was killed could not be undone: {'; '.join(problems)}. If a "
            f"server is beyond repair, start it again: it serves {journal['from'] or 'nothing'} from disk"
        )
    return None


def set_aside(config: Config, version: int) -> None:
    """Moves a whole version that is installed out of an install's way, until what is installed in its place serves: a
    rollback to what is proven must not have to do with what was just built."""
    live = repository.live(config)
    if version not in repository.installed(live):
        return
    if problem := repository.damage(live, version):
        log.warning("version %d is installed anew: %s", version, problem)
        return
    for part in repository.PARTS:
        moved = repository.folder(aside(config), part, version)
        moved.parent.mkdir(parents=True, exist_ok=True)
        repository.folder(live, part, version).rename(moved)


def put_back(config: Config) -> None:
    """Moves what was set aside into its place again, over what was installed there."""
    for moved in sorted(aside(config).glob("*/[1-9]*")):
        place = repository.live(config) / moved.relative_to(aside(config))
        shutil.rmtree(place, ignore_errors=True)
        moved.rename(place)


def discard(config: Config, version: int) -> None:
    """Removes what was installed of a version that did not come into service; one that served stays, to go back to."""
    live = repository.live(config)
    try:
        good = registry.history(config)
    except Exception as error:  # its gigabytes are in nobody's way until the next swap that succeeds
        log.warning("version %d stays in %s: %s", version, live, error)
        return
    if version not in (repository.served(live), *good):
        repository.remove(live, version)


def aside(config: Config) -> Path:
    return config.workspace / "triton" / "aside"


def classifier(config: Config, version: int) -> Path:
    """The folder of an installed version that holds its engine.json."""
    return repository.folder(repository.live(config), repository.CLASSIFIER, version)


def as_installed(config: Config, version: int) -> Config:
    return repository.as_built(config, classifier(config, version))
