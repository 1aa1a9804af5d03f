"""Put a version into service without a dropped request, or leave everything as it was.

The new version is loaded beside the old one and asked some messages whose answers are known. Then the ensemble is tied
to it, which is the switch: requests under way end on the old version, all others go to the new one. What a version
brings goes over as a whole, its tokenizer too. Where memory allows, the old one stays loaded: going back is a switch.

Several servers share one live repository. Each in turn proves the new version before the first is switched.
"""

import logging
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks import files
from tasks.config import Config
from tasks.errors import StepFailed, UsageError
from tasks.labels import LABELS, TYPES
from tasks.promotion import registry
from tasks.run import Run, remove_builds
from tasks.serving import build_engine, client, memory, repository, triton

log = logging.getLogger(__name__)


def run(config: Config, run: Run) -> dict:
    """Swaps the run's staged version for the champion in the live servers.

    Returns {"served_version", "previous_version", "swap_seconds"}; a version that is in service already stays, but for
    its files on disk: where they are damaged, or fit this TensorRT or GPU no more, what was built anew replaces them.

    Raises:
        StepFailed: somebody else changed the champion meanwhile, a server does not answer, or the new version does not
            do there what it did in `stage`. The version that served before goes on serving.
        UsageError: what the run has built is not there any more, or has changed since; or nobody has approved it.
    """
    version = run.result("build_engine")["version"]
    with registry.lease(config, f"swap of run {run.id}", run.id) as still_mine, live_servers(config) as servers:
        finish_or_undo(config, servers)
        champion = registry.alias(config, "champion")
        if champion == version and repository.served(repository.live(config)) == version:
            renewed = renew(config, servers, run, version)
            for server in servers.values():
                serve_again(config, server, version, renewed)
            renewal_file(config).unlink(missing_ok=True)
            log.info("version %d is in service already", version)
            remove_builds(config.workspace, run.id)
            return {"served_version": version, "previous_version": registry.alias(config, "previous")}
        decided = run.result("decide")
        require_approval(version, decided)
        registry.require_champion(config, version, decided["champion"])
        registry.require_not_rolled_back(config, version, since=decided["at"])
        held = registry.hold(config)
        if held and decided.get("by_mode"):
            raise StepFailed(
                f"automatic promotion is on hold ({held}): trigger toxicity_release for version {version}, or clear "
                'the hold with `python commands.py hold --clear --reason="…"` and run swap again'
            )
        if repository.served(repository.live(config)) == version:
            raise StepFailed(
                f"{repository.live(config)} serves another version {version} than this registry's: stop the server, "
                "remove that folder, start the server and run swap again"
            )
        install(config, run, build_engine.of_run(config, run)[1], version)
        if config.release.version and champion and version == registry.alias(config, "previous"):
            change = going_back(config, champion, version, decided["reviewer"], decided["reason"])
        else:
            change = going_forward(config, champion, version)
        seconds = replace(config, servers, still_mine, version, **change)
    remove_builds(config.workspace, run.id)  # the live repository has all that is needed now
    return {"served_version": version, "previous_version": champion, "swap_seconds": seconds}


def require_approval(version: int, decided: dict) -> None:
    """Raises UsageError unless it says so: whoever may mark and clear tasks can come to `swap` past a rejection."""
    if decided["decision"] != "approve":
        raise UsageError(
            f"version {version} was not approved ({decided['reviewer']}: {decided['reason']}): trigger "
            "toxicity_release for it, or run decide, export_onnx, build_engine, stage and swap again"
        )


def renew(config: Config, servers: dict, run: Run, version: int) -> bool:
    """Puts what the run has built into the place of the champion's files, where no server could load them any more.

    Returns whether it did. A server that has the version loaded goes on from memory until it has loaded the new files.

    Raises:
        UsageError: the files are damaged, and the run has built nothing that could replace them.
    """
    live, begun = repository.live(config), renewal_file(config)
    if problem := why_not_loaded(config, servers, run, version):
        log.warning("version %d is installed anew: %s", version, problem)
        built = build_engine.of_run(config, run)[1]
        files.write_json(begun, {"version": version})
        install(config, run, built, version)
    elif not begun.exists():
        return False
    config = repository.as_built(config, live, version)
    for part in repository.PARTS:
        repository.write(live, repository.part_config(config, part, [version]))
    repository.write(live, repository.text_config(config, version))
    return True


def renewal_file(config: Config) -> Path:
    """There from before the champion's files are replaced until every server has loaded them: without it, a second try
    would see whole files and a server that answers from memory, and take that for the end."""
    return config.workspace / "triton" / "renewal.json"


def why_not_loaded(config: Config, servers: dict, run: Run, version: int) -> str | None:
    """Why a server that starts now would not load the champion's files, where the run's would do; None if it would."""
    live = repository.live(config)
    try:
        repository.verify(live, version)
    except StepFailed as error:
        return str(error)
    if any(has_loaded(server, version) for server in servers.values()) or not build_engine.is_there(config, run):
        return None
    built = files.read_json(build_engine.folder_of(config, run) / "engine.json")
    installed = files.read_json(repository.folder(live, repository.CLASSIFIER, version) / "engine.json")
    if build_engine.fit_alike(installed, built):
        return None
    return f"it was built with {build_engine.in_words(installed)}"


def serve_again(config: Config, server, version: int, renewed: bool) -> None:
    """Loads the version in service where a server has lost it, or the files it was loaded from are no more, and sees it
    answer. Raises StepFailed where it fails."""
    from tritonclient.utils import InferenceServerException

    try:
        serves = has_loaded(server, version) and server.is_model_ready(repository.TEXT, client_timeout=60)
        if renewed or not serves:
            log.warning("version %d is loaded again: %s", version, "its files are new" if serves else "it was lost")
            server.load_model(repository.TEXT, client_timeout=config.serving.load_timeout_s)
        confirm(config, server, version, repository.TEXT)
    except InferenceServerException as error:
        raise StepFailed(
            f"version {version} is in service, but a server does not load it: {error.message()}: its log says more; "
            "start it again, or put another version into service"
        ) from None


def going_forward(config: Config, champion: int | None, version: int) -> dict:
    """What the registry learns when a version has come into service: the arguments of `replace`."""
    tags = {version: {"verdict": "promoted", "served_at": registry.now()}}
    aliases = {**wish_fulfilled(config, version), "previous": champion, "champion": version}
    if champion == version:  # a server that has lost the champion gets it back; it did not replace itself
        del aliases["previous"]
    elif champion:
        tags[champion] = {"replaced_by": version, "replaced_at": registry.now()}
    return {"aliases": aliases, "tags": tags}


def going_back(config: Config, bad: int, version: int, who: str, why: str) -> dict:
    """What the registry learns when an older version serves again in the place of a bad one; see `replace`.

    `previous` becomes what a further rollback would go to, never the bad version.
    """
    before = next((other for other in registry.history(config) if other not in (bad, version)), None)
    at = registry.now()
    tags = {
        bad: {"rolled_back_by": who, "rolled_back_because": why, "rolled_back_at": at},
        version: {"served_at": at},
    }
    aliases = {**wish_fulfilled(config, version, bad), "previous": before, "champion": version}
    return {"aliases": aliases, "tags": tags, "hold": f"version {bad} was rolled back by {who}: {why}"}


def wish_fulfilled(config: Config, *versions: int) -> dict:
    """Takes `approved` from a version that serves now, or is bad: a wish that stays would start another release."""
    return {"approved": None} if registry.alias(config, "approved") in versions else {}


def install(config: Config, run: Run, engine: Path, version: int) -> None:
    """Puts the staged files into the live repository as folders of version `version`."""
    live, staged = repository.live(config), run.result("stage")
    if staged["sha256"] != files.read_json(engine / "engine.json")["sha256"]:
        raise StepFailed(f"{engine} is not what was staged: run `python commands.py stage` first")
    repository.install(engine, live, version, golden=staged["golden"])
    repository.verify(live, version)


@contextmanager
def live_servers(config: Config):
    """gRPC clients of all live servers, by address; nothing may change before every one has answered.

    Raises:
        StepFailed: one does not answer, or serves a model that was copied in by hand.
    """
    from tritonclient.grpc import InferenceServerClient

    with ExitStack() as stack:
        servers = {url: stack.enter_context(InferenceServerClient(url)) for url in config.serving.urls}
        for url, server in servers.items():
            require_answer(url, server)
        yield servers


def require_answer(url: str, server) -> None:
    from tritonclient.utils import InferenceServerException

    try:
        name = server.get_server_metadata(client_timeout=10).name
    except InferenceServerException as error:
        raise StepFailed(
            f"the live Triton at {url} does not answer ({error.message()}): `make demo` or ./start_triton_server.sh "
            "starts it; serving.urls or TRITON_URL names others, or leaves it out"
        ) from None
    if name == triton.BY_HAND:
        raise StepFailed(
            f"the Triton at {url} serves a model.onnx copied in by hand: stop it, and start "
            "`python -m tasks.serving.triton`, which serves what swap brings"
        )


# The swap itself, which rollback uses too -----------------------------------------------------------------------------


def journal_file(config: Config) -> Path:
    return config.workspace / "triton" / "swap.json"


def replace(
    config: Config, servers: dict, still_mine, version: int, aliases: dict, tags: dict, hold: str | None = None
) -> float:
    """Puts an installed version into service in the place of the one that serves; returns the seconds it took.

    Args:
        servers: as from live_servers.
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
    live = repository.live(config)
    config = repository.as_built(config, live, version)
    try:
        beside = repository.for_both(config, live, repository.served(live), version)
        require_fit(config, servers, version)
        journal = begin(config, servers, version, aliases, tags, hold)
    except Exception as error:
        discard(config, version)
        raise StepFailed(f"version {version} is not put into service, what serves goes on: {error}") from error
    try:
        for server in servers.values():
            load_beside(beside, server, journal)
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
        undo(config, servers, journal, reason or type(error).__name__)
        if not isinstance(error, Exception):
            raise
        raise StepFailed(
            f"version {version} is not put into service, {journal['from'] or 'none'} serves as before: {reason}"
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


def require_fit(config: Config, servers: dict, version: int) -> None:
    """Raises StepFailed where a server has an engine loaded that fits another TensorRT or GPU than the version's does.

    What the server itself says of a plan that does not fit it names neither.
    """
    live = repository.live(config)
    old = repository.served(live)
    if old not in repository.installed(live):
        return
    before, after = (
        files.read_json(repository.folder(live, repository.CLASSIFIER, one) / "engine.json") for one in (old, version)
    )
    serving = [url for url, server in servers.items() if has_loaded(server, old)]
    if serving and not build_engine.fit_alike(before, after):
        raise StepFailed(
            f"version {version} was built with {build_engine.in_words(after)}, but {serving[0]} serves version {old}, "
            f"built with {build_engine.in_words(before)}: trigger toxicity_release for version {version}, which builds "
            "it anew; or where the Triton image has changed, start the server from it first"
        )


def begin(config: Config, servers: dict, version: int, aliases: dict, tags: dict, hold: str | None) -> dict:
    """Writes the journal, from which whoever comes next can finish or undo what a killed process has begun."""
    live = repository.live(config)
    repository.create(config, live)
    old = repository.served(live)
    unload_others(config, servers, {old, version})
    journal = {
        "from": old,
        "serving": [url for url, server in servers.items() if old and has_loaded(server, old)],
        "to": version,
        "started_at": registry.now(),
        "configs": {m: repository.config_file(live, m).read_text() for m in (*repository.PARTS, repository.TEXT)},
        "aliases": aliases,
        "aliases_before": {name: registry.alias(config, name) for name in aliases},
        "tags": tags,
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
                if all(is_ready(server, part, version) for version in kept):
                    load(config, server, wanted)
            repository.write(live, wanted)


def has_loaded(server, version: int) -> bool:
    return all(is_ready(server, part, version) for part in repository.PARTS)


def is_ready(server, part: str, version: int) -> bool:
    return server.is_model_ready(part, str(version), client_timeout=60)


def versions_during(journal: dict) -> list[int]:
    """What is loaded between the start and the end of a swap; a version that loaded nowhere is not waited for."""
    return sorted({journal["to"], *([journal["from"]] if journal["serving"] else [])})


def load_beside(config: Config, server, journal: dict) -> None:
    """Loads the new version's parts while the old one goes on serving.

    Each is written down as soon as it has loaded: with an ensemble a server reads its parts' configurations again.

    Args:
        config: what serves both, from repository.for_both.
    """
    for part in repository.PARTS:
        wanted = repository.part_config(config, part, versions_during(journal))
        load(config, server, wanted)
        repository.write(repository.live(config), wanted)


def try_out(config: Config, server, version: int) -> None:
    """Asks the loaded version its golden messages, through an ensemble that no client knows."""
    load(config, server, repository.text_config(config, version, repository.TRIAL))
    confirm(config, server, version, repository.TRIAL)
    server.unload_model(repository.TRIAL, client_timeout=config.serving.load_timeout_s)


def switch(config: Config, servers: dict, still_mine, version: int) -> None:
    """Ties the ensemble to a version, sees it answer, and only then writes it down: the commit."""
    wanted = repository.text_config(config, version)
    for server in servers.values():
        still_mine()
        load(config, server, wanted)
        confirm(config, server, version, repository.TEXT)
    still_mine()
    repository.write(repository.live(config), wanted)


def load(config: Config, server, wanted) -> None:
    """Loads a model with this configuration, over gRPC: over HTTP the server's other HTTP clients would hang."""
    from google.protobuf import json_format

    text = json_format.MessageToJson(wanted, preserving_proto_field_name=True)
    server.load_model(wanted.name, config=text, client_timeout=config.serving.load_timeout_s)


def confirm(config: Config, server, version: int, ensemble: str) -> None:
    """Raises StepFailed unless the ensemble answers as this version, as it did in `stage`."""
    missing = [part for part in repository.PARTS if not is_ready(server, part, version)]
    if missing:
        raise StepFailed(f"the server says that version {version} of {', '.join(missing)} is not ready")
    for message in repository.golden(repository.live(config), version):
        found = client.ask(server, [message["text"]], config.serving.load_timeout_s, ensemble)[0]
        if not as_expected(found, message, version, config.serving.score_tolerance):
            raise StepFailed(f"{message['text'][:60]!r} is answered with {found}, in stage it was {message['answer']}")


def as_expected(found: dict, message: dict, version: int, tolerance: float) -> bool:
    """Whether an answer has the form that every version keeps, and is this version's, as recorded in `stage`.

    Args:
        tolerance: of the scores; see serving.score_tolerance.
    """
    if not well_formed(found) or found["version"] != version:
        return False
    expected, either_way = message["answer"], message.get("near_threshold", False)
    decided = (found["toxic"], found["labels"])
    if decided != (expected["toxic"], expected["labels"]) and not either_way:
        return False
    return all(abs(found["scores"][name] - score) <= tolerance for name, score in expected["scores"].items())


def well_formed(answer: dict) -> bool:
    """Whether it says toxic or not, types only of a toxic message, a probability for each label, and a version."""
    if set(answer) != {"toxic", "labels", "scores", "version"} or list(answer["scores"]) != list(LABELS):
        return False
    labels_fit = set(answer["labels"]) <= set(TYPES) and (answer["toxic"] or not answer["labels"])
    return labels_fit and all(0 <= score <= 1 for score in answer["scores"].values())


def set_aliases(config: Config, aliases: dict) -> None:
    for name, version in aliases.items():
        if version is not None:
            registry.set_alias(config, name, version)
        elif registry.alias(config, name) is not None:
            registry.delete_alias(config, name)


def finish(config: Config, servers: dict, journal: dict) -> None:
    """What follows a commit: the old version leaves memory, or stays for a quick way back; the registry learns it."""
    live, version = repository.live(config), journal["to"]
    config = repository.as_built(config, live, version)
    kept = [journal["from"]] if keeps_previous(config, servers, journal) else []
    for server in servers.values():
        load(config, server, repository.text_config(config, version))  # one may have started again since the switch
    for part in repository.PARTS:
        wanted = repository.part_config(config, part, sorted([*kept, version]))
        for url, server in servers.items():
            load(config, server, wanted)
            require_unloaded(url, server, part, set(repository.installed(live)) - {version, *kept})
        repository.write(live, wanted)
    for tagged, values in journal["tags"].items():
        registry.tag(config, int(tagged), **values)
    registry.untag(config, version, "swap_failed_because", "swap_failed_at")
    repository.prune(live, [*kept, *registry.history(config)])
    renewal_file(config).unlink(missing_ok=True)  # of a version that serves no more
    journal_file(config).unlink()
    log.info("version %d is in service%s", version, f", {kept[0]} stays loaded" if kept else "")


def keeps_previous(config: Config, servers: dict, journal: dict) -> bool:
    """Whether the version that served stays loaded: a good one, where configuration and memory allow."""
    old, setting = journal["from"], config.serving.keep_previous_loaded
    if setting is False or journal["hold"] or old in (None, journal["to"]):
        return False
    if not all(has_loaded(server, old) for server in servers.values()):
        return False
    return setting is True or all(has_room(config, url, journal["to"]) for url in servers)


def has_room(config: Config, url: str, version: int) -> bool:
    """Whether a server with two versions loaded leaves enough memory to stage a third, and the headroom."""
    address = f"http://{url.rpartition(':')[0]}:{config.serving.metrics_port}/metrics"
    free = memory.free_by_metrics(config, address)
    if free is None:
        return False
    engine = repository.folder(repository.live(config), repository.CLASSIFIER, version)
    return free >= memory.needed(config, engine) + config.serving.memory_headroom_gib * memory.GIB


def require_unloaded(url: str, server, part: str, versions: set[int]) -> None:
    for version in versions:
        if is_ready(server, part, version):
            raise StepFailed(f"{part} version {version} is still loaded at {url}: run the same command again")


def undo(config: Config, servers: dict, journal: dict, reason: str) -> None:
    """Everything as it was before. What cannot be reached now is left to the next swap or rollback, by the journal."""
    problems, reached = [], dict(servers)
    # The ensemble first, everywhere: with it a server reads its parts' configurations, and would let go of the version
    # that it still asks. A server that is away must not keep the others from going back.
    for models in ((repository.TEXT,), repository.PARTS):
        for model in models:
            files.write_text(repository.config_file(repository.live(config), model), journal["configs"][model])
        for url, server in list(reached.items()):
            try:
                restore(config, server, models, journal, url in journal["serving"])
            except Exception as error:
                problems.append(f"{url}: {error}")
                del reached[url]
    try:
        set_aliases(config, journal["aliases_before"])
        registry.tag(config, journal["to"], swap_failed_because=reason[:5000], swap_failed_at=registry.now())
    except Exception as error:
        problems.append(str(error))
    if problems:
        log.error("not all could be undone, the next swap or rollback tries again: %s", "; ".join(problems))
    else:
        journal_file(config).unlink()
        discard(config, journal["to"])


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


def restore(config: Config, server, models: tuple[str, ...], journal: dict, was_loaded: bool) -> None:
    """Has a server read models' configurations on disk again, or forget the models if nothing was in service."""
    from tritonclient.utils import InferenceServerException

    timeout_s = config.serving.load_timeout_s
    server.unload_model(repository.TRIAL, client_timeout=timeout_s)
    for model in models:
        if journal["from"] is None:
            server.unload_model(model, client_timeout=timeout_s)
            continue
        try:
            server.load_model(model, client_timeout=timeout_s)
        except InferenceServerException:
            if was_loaded:  # else it did not load before either
                raise


def finish_or_undo(config: Config, servers: dict) -> dict | None:
    """Ends a swap or rollback that was killed: finished if it had committed, else undone.

    Returns the journal of one that it has finished, else None.

    Raises:
        StepFailed: neither works now.
    """
    if not journal_file(config).exists():
        return None
    journal = files.read_json(journal_file(config))
    committed = repository.served(repository.live(config)) == journal["to"]
    log.warning("%s the killed swap to version %d", "finishing" if committed else "undoing", journal["to"])
    if committed:
        set_aliases(config, journal["aliases"])
        finish(config, servers, journal)
        return journal
    undo(config, servers, journal, "the process was killed before the commit")
    if journal_file(config).exists():
        raise StepFailed(
            f"the swap to version {journal['to']} that was killed could not be undone: see the log; if a server is "
            f"beyond repair, start it again: it serves {journal['from'] or 'nothing'} from disk"
        )
    return None
