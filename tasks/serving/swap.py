"""Put a version into service without a dropped request, or leave everything as it was.

The new version is loaded beside the old one and asked some messages whose answers are known. Then the ensemble is tied
to it, which is the switch: requests under way end on the old version, all others go to the new one. What a version
brings goes over as a whole, its tokenizer too.
"""

import logging
import time
from contextlib import contextmanager
from pathlib import Path

from tasks import files
from tasks.config import Config
from tasks.errors import StepFailed
from tasks.promotion import registry
from tasks.run import Run, remove_builds
from tasks.serving import build_engine, client, repository, triton

log = logging.getLogger(__name__)

SCORE_TOLERANCE = 0.02  # of a golden message's score: a request's neighbours in a batch change the last digits


def run(config: Config, run: Run) -> dict:
    """Swaps the run's staged version for the champion in the live server.

    Returns {"served_version", "previous_version", "swap_seconds"}; a version that is in service already is left alone.

    Raises:
        StepFailed: somebody else changed the champion meanwhile, the server does not answer, or the new version does
            not do there what it did in `stage`. The version that served before goes on serving.
    """
    version = run.result("build_engine")["version"]
    with registry.lease(config, f"swap of run {run.id}", run.id) as still_mine, live_server(config) as server:
        finish_or_undo(config, server)
        champion = registry.alias(config, "champion")
        if champion == version and repository.served(repository.live(config)) == version:
            log.info("version %d is in service already", version)
            remove_builds(config.workspace, run.id)
            return {"served_version": version, "previous_version": registry.alias(config, "previous")}
        decided = run.result("decide")
        registry.require_champion(config, version, decided["champion"])
        registry.require_not_rolled_back(config, version, since=decided["at"])
        held = registry.hold(config)
        if held and decided.get("by_mode"):
            raise StepFailed(
                f"automatic promotion is on hold ({held}): trigger toxicity_release for version {version}, or clear "
                'the hold with `python commands.py hold --clear --reason="…"` and run swap again'
            )
        install(config, run, build_engine.of_run(config, run)[1], version)
        if config.release.version and champion and version == registry.alias(config, "previous"):
            change = going_back(config, champion, version, decided["reviewer"], decided["reason"])
        else:
            change = going_forward(config, champion, version)
        seconds = replace(config, server, still_mine, version, **change)
    remove_builds(config.workspace, run.id)  # the live repository has all that is needed now
    return {"served_version": version, "previous_version": champion, "swap_seconds": seconds}


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
    if repository.served(live) == version:
        raise StepFailed(
            f"{live} serves another version {version} than this registry's: stop the server, remove {live}, start the "
            "server and run swap again"
        )
    repository.install(engine, live, version, golden=staged["golden"])
    repository.verify(live, version)


@contextmanager
def live_server(config: Config):
    """A gRPC client of the live server.

    Raises:
        StepFailed: it does not answer, or serves a model that was copied in by hand.
    """
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(config.serving.url) as server:
        try:
            name = server.get_server_metadata(client_timeout=10).name
        except InferenceServerException as error:
            raise StepFailed(
                f"the live Triton at {config.serving.url} does not answer ({error.message()}): `make demo` or "
                "./start_triton_server.sh starts it; serving.url or TRITON_URL names another"
            ) from None
        if name == triton.BY_HAND:
            raise StepFailed(
                f"the Triton at {config.serving.url} serves a model.onnx copied in by hand: stop it, and start "
                "`python -m tasks.serving.triton`, which serves what swap brings"
            )
        yield server


# The swap itself, which rollback uses too -----------------------------------------------------------------------------


def journal_file(config: Config) -> Path:
    return config.workspace / "triton" / "swap.json"


def replace(
    config: Config, server, still_mine, version: int, aliases: dict, tags: dict, hold: str | None = None
) -> float:
    """Puts an installed version into service in the place of the one that serves; returns the seconds it took.

    Args:
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
    repository.create(config, live)
    old = repository.served(live)
    loaded = old is not None and all(server.is_model_ready(part, str(old)) for part in repository.PARTS)
    journal = {
        "from": old,
        "serving": old if loaded else None,
        "to": version,
        "started_at": registry.now(),
        "configs": {m: repository.config_file(live, m).read_text() for m in (*repository.PARTS, repository.TEXT)},
        "aliases": aliases,
        "aliases_before": {name: registry.alias(config, name) for name in aliases},
        "tags": tags,
        "hold": hold,  # says that it is a rollback
    }
    files.write_json(journal_file(config), journal)
    try:
        load_beside(config, server, live, journal["serving"], version)
        try_out(config, server, live, version)
        switch(config, server, still_mine, live, version)
        still_mine()
        set_aliases(config, aliases)
    except registry.LeaseLost:
        raise  # an undo now would undo what the other does
    except BaseException as error:
        log.error("version %d is not put into service: %s", version, error)
        undo(config, server, journal)
        if not isinstance(error, Exception):
            raise
        raise StepFailed(
            f"version {version} is not put into service, {old or 'none'} serves as before: "
            + " ".join(str(error).split())
        ) from error
    try:
        finish(config, server, journal)
    except Exception as error:
        raise StepFailed(
            f"version {version} is in service, but not all that follows is done, so run the same command again: "
            + " ".join(str(error).split())
        ) from error
    return round(time.monotonic() - started, 2)


def load_beside(config: Config, server, live: Path, old: int | None, new: int) -> None:
    """Loads the new version's parts while the old one goes on serving; on disk only what has loaded is written."""
    versions = sorted({old, new} - {None})
    for part in repository.PARTS:
        wanted = repository.part_config(config, part, versions)
        load(config, server, wanted)
        repository.write(live, wanted)


def try_out(config: Config, server, live: Path, version: int) -> None:
    """Asks the loaded version its golden messages, through an ensemble that no client knows."""
    load(config, server, repository.text_config(config, version, repository.TRIAL))
    confirm(server, live, version, repository.TRIAL)
    server.unload_model(repository.TRIAL)


def switch(config: Config, server, still_mine, live: Path, version: int) -> None:
    """Ties the ensemble to a version, sees it answer, and only then writes it down: the commit."""
    wanted = repository.text_config(config, version)
    still_mine()
    load(config, server, wanted)
    confirm(server, live, version, repository.TEXT)
    still_mine()
    repository.write(live, wanted)


def load(config: Config, server, wanted) -> None:
    """Loads a model with this configuration, over gRPC: over HTTP the server's other HTTP clients would hang."""
    from google.protobuf import json_format

    text = json_format.MessageToJson(wanted, preserving_proto_field_name=True)
    server.load_model(wanted.name, config=text, client_timeout=config.serving.load_timeout_s)


def confirm(server, live: Path, version: int, ensemble: str) -> None:
    """Raises StepFailed unless the ensemble answers as this version, as it did in `stage`."""
    missing = [part for part in repository.PARTS if not server.is_model_ready(part, str(version))]
    if missing:
        raise StepFailed(f"the server says that version {version} of {', '.join(missing)} is not ready")
    for message in repository.golden(live, version):
        expected, found = message["answer"], client.ask(server, [message["text"]], model=ensemble)[0]
        off = max(abs(found["scores"][name] - score) for name, score in expected["scores"].items())
        if found["version"] != version or found["labels"] != expected["labels"] or off > SCORE_TOLERANCE:
            raise StepFailed(f"{message['text'][:60]!r} is answered with {found}, in stage it was {expected}")


def set_aliases(config: Config, aliases: dict) -> None:
    for name, version in aliases.items():
        if version is not None:
            registry.set_alias(config, name, version)
        elif registry.alias(config, name) is not None:
            registry.delete_alias(config, name)


def finish(config: Config, server, journal: dict) -> None:
    """What follows a commit: the old version leaves the server's memory, the registry learns it, old folders go."""
    live, version = repository.live(config), journal["to"]
    config = repository.as_built(config, live, version)
    for part in repository.PARTS:
        wanted = repository.part_config(config, part, [version])
        load(config, server, wanted)
        repository.write(live, wanted)
        for other in set(repository.installed(live)) - {version}:
            if server.is_model_ready(part, str(other)):
                raise StepFailed(f"{part} version {other} is still loaded beside {version}: run swap again")
    for tagged, values in journal["tags"].items():
        registry.tag(config, int(tagged), **values)
    repository.prune(live, registry.history(config))
    journal_file(config).unlink()
    log.info("version %d is in service", version)


def undo(config: Config, server, journal: dict) -> None:
    """Everything as it was before. What cannot be reached now is left to the next swap or rollback, by the journal."""
    live = repository.live(config)
    try:
        server.unload_model(repository.TRIAL)
        # The ensemble first: it must not stay tied to a version whose parts go.
        for model in (repository.TEXT, *repository.PARTS):
            files.write_text(repository.config_file(live, model), journal["configs"][model])
            restore(config, server, model, journal)
        set_aliases(config, journal["aliases_before"])
    except Exception as error:
        log.error("not all could be undone, the next swap or rollback tries again: %s", error)
        return
    journal_file(config).unlink()


def restore(config: Config, server, model: str, journal: dict) -> None:
    """Has the server read a model's configuration on disk again, or forget the model if nothing was in service."""
    from tritonclient.utils import InferenceServerException

    if journal["from"] is None:
        server.unload_model(model)
        return
    try:
        server.load_model(model, client_timeout=config.serving.load_timeout_s)
    except InferenceServerException:
        if journal["serving"] is not None:  # else it did not load before either
            raise


def finish_or_undo(config: Config, server) -> dict | None:
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
        finish(config, server, journal)
        return journal
    undo(config, server, journal)
    if journal_file(config).exists():
        raise StepFailed(
            f"the swap to version {journal['to']} that was killed could not be undone: see the log; if the server is "
            f"beyond repair, start it again: it serves {journal['from'] or 'nothing'} from disk"
        )
    return None
