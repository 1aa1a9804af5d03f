"""Put the run's version into service without a dropped request, or leave everything as it was."""

import logging
from pathlib import Path

from tasks import files
from tasks.config import Config
from tasks.errors import StepFailed, UsageError
from tasks.promotion import in_service, registry, signatures
from tasks.run import Run, remove_builds
from tasks.serving import build_engine, exchange, live_servers, repository

log = logging.getLogger(__name__)


def run(config: Config, run: Run) -> dict:
    """Swaps the run's staged version for the champion in the live servers.

    Returns {"served_version", "previous_version", "swap_seconds"}; a version that is in service already stays, but for
    its files on disk: where they are damaged, or fit this TensorRT or GPU no more, what was built anew replaces them.

    Raises:
        StepFailed: somebody else changed the champion meanwhile, a server does not answer, or the new version does not
            do there what it did in `stage`. The version that served before goes on serving.
        UsageError: what the run has built is not there any more, or has changed since; nobody has approved it; or
            another model serves under its number.
        Unsigned: no step has written what the registry says of the version.
    """
    version = run.result("build_engine")["version"]
    signatures.signing_key(config.workspace)  # now, not when the new version has been switched to
    with registry.lease(config, f"swap of run {run.id}", run.id) as still_mine, live_servers.connect(config) as servers:
        exchange.finish_or_undo(config, servers)
        serving = in_service.repair(config)
        # Where nothing serves, the alias may name what never did: nobody goes back to that.
        champion = serving.version if serving and (serving.on_disk or not serving.warning) else None
        if champion == version and serving.on_disk:
            go_on_with(config, servers, run, version)
            remove_builds(config.workspace, run.id)
            return {"served_version": version, "previous_version": registry.alias(config, "previous")}
        decided = run.result("decide")
        require_wanted(config, version, decided)
        engine = build_engine.of_run(config, run)[1]
        exchange.require_fit_beside(config, servers, version, engine)
        if config.release.version and champion and version == registry.alias(config, "previous"):
            change = going_back(config, champion, version, decided["reviewer"], decided["reason"])
        else:
            change = going_forward(config, champion, version)
        exchange.set_aside(config, version)
        try:
            install(config, run, engine, version)
        except BaseException:
            exchange.put_back(config)
            raise
        seconds = exchange.replace(config, servers, still_mine, version, **change)
    remove_builds(config.workspace, run.id)  # the live repository has all that is needed now
    before = serving and serving.number
    return {"served_version": version, "previous_version": before, "swap_seconds": seconds}


def repair(overrides, config_path, config_name) -> dict:
    """Sets the aliases `champion` and `previous` again where hands have removed or moved them; puts nothing else into
    service. A swap or rollback that was killed is finished or undone first.

    Returns {"served_version", "engine", "aliases": {name: version or None}, "was": what the registry had wrong}.

    Raises:
        StepFailed: nothing serves, or what serves is no version of this registry, so that no alias can name it.
    """
    from tasks.step import without_a_run

    config = without_a_run(overrides, config_path, config_name)
    with registry.lease(config, "repair of the aliases"), live_servers.connect(config) as servers:
        exchange.finish_or_undo(config, servers)
        serving = in_service.repair(config)
    if serving is None:
        raise StepFailed("no version is in service, so there is no alias to set again")
    if not serving.on_disk or serving.version is None:
        raise StepFailed(serving.warning or f"nothing serves in {repository.live(config)}: release {serving} anew")
    aliases = {name: registry.alias(config, name) for name in ("champion", "previous")}
    known = {"served_version": serving.version, "engine": serving.engine}
    return {"step": "swap", **known, "aliases": aliases, "was": serving.warning}


def require_approval(version: int, decided: dict) -> None:
    """Raises UsageError unless it says so: whoever may mark and clear tasks can come to `swap` past a rejection."""
    if decided["decision"] != "approve":
        raise UsageError(
            f"version {version} was not approved ({decided['reviewer']}: {decided['reason']}): trigger "
            "toxicity_release for it, or run decide, export_onnx, build_engine, stage and swap again"
        )


def require_wanted(config: Config, version: int, decided: dict) -> None:
    """Raises StepFailed or UsageError where the version was not approved, or what has happened since speaks against it.

    Args:
        decided: the result of `decide`.
    """
    require_approval(version, decided)
    in_service.require_own_number(config, version)
    registry.require_signed(config, version, "release" if config.release.version else "decide", "build_engine")
    in_service.require_champion(config, version, decided["champion"])
    registry.require_not_rolled_back(config, version, since=decided["at"])
    held = registry.hold(config)
    if held and decided.get("by_mode"):
        raise StepFailed(
            f"automatic promotion is on hold ({held}): trigger toxicity_release for version {version}, or clear "
            'the hold with `python commands.py hold --clear --reason="…"` and run swap again'
        )


def install(config: Config, run: Run, engine: Path, version: int) -> None:
    """Puts the staged files into the live repository as folders of version `version`."""
    live, staged = repository.live(config), run.result("stage")
    if staged["sha256"] != files.read_json(engine / "engine.json")["sha256"]:
        raise StepFailed(f"{engine} is not what was staged: run `python commands.py stage` first")
    repository.install(engine, live, version, golden=staged["golden"])
    repository.verify(live, version)


def going_forward(config: Config, champion: int | None, version: int) -> dict:
    """What the registry learns when a version has come into service: the arguments of `replace`."""
    tags = {version: {"verdict": "promoted", "served_at": registry.now()}}
    before = champion or next((other for other in in_service.history(config) if other != version), None)
    aliases = {**wish_fulfilled(config, version), "previous": before, "champion": version}
    if champion == version:  # a server that has lost the champion gets it back; it did not replace itself
        del aliases["previous"]
    elif champion:
        tags[champion] = {"replaced_by": version, "replaced_at": registry.now()}
    return {"aliases": aliases, "tags": tags}


def going_back(config: Config, bad: int | None, version: int, who: str, why: str, number: int | None = None) -> dict:
    """What the registry learns when an older version serves again in the place of a bad one; see `replace`.

    `previous` becomes what a further rollback would go to, never the bad version.

    Args:
        bad: the bad version; None where the registry does not have it.
        number: as which it answers, where that is all that is known of it.
    """
    before = next((other for other in in_service.history(config) if other not in (bad, version)), None)
    at = registry.now()
    tags = {version: {"served_at": at}}
    if bad is not None:
        tags[bad] = {"rolled_back_by": who, "rolled_back_because": why, "rolled_back_at": at}
    aliases = {**wish_fulfilled(config, version, bad), "previous": before, "champion": version}
    return {"aliases": aliases, "tags": tags, "hold": f"version {bad or number} was rolled back by {who}: {why}"}


def wish_fulfilled(config: Config, *versions: int | None) -> dict:
    """Takes `approved` from a version that serves now, or is bad: a wish that stays would start another release."""
    approved = registry.alias(config, "approved")
    return {"approved": None} if approved is not None and approved in versions else {}


# A version that is in service already ---------------------------------------------------------------------------------


def go_on_with(config: Config, servers: dict, run: Run, version: int) -> None:
    """Sees that every server answers as the version, and from files that would load again."""
    renewed = renew(config, servers, run, version)
    for server in servers.values():
        serve_again(config, server, version, renewed)
    exchange.renewal_file(config).unlink(missing_ok=True)
    log.info("version %d is in service already", version)


def renew(config: Config, servers: dict, run: Run, version: int) -> bool:
    """Puts what the run has built into the place of the champion's files, where no server could load them any more.

    Returns whether it did. A server that has the version loaded goes on from memory until it has loaded the new files.

    Raises:
        UsageError: the files are damaged, and the run has built nothing that could replace them.
    """
    live, begun = repository.live(config), exchange.renewal_file(config)
    if problem := why_not_loaded(config, servers, run, version):
        log.warning("version %d is installed anew: %s", version, problem)
        tags = registry.require_signed(config, version, "build_engine").tags
        built = build_engine.of_run(config, run)[1]
        files.write_json(begun, {"version": version})
        install(config, run, built, version)
        facts = {in_service.SERVED: repository.engine(live, version)["sha256"]}
        registry.record(config, version, **facts, served_at=tags.get("served_at") or registry.now())
    elif not begun.exists():
        return False
    config = exchange.as_installed(config, version)
    for part in repository.PARTS:
        repository.write(live, repository.part_config(config, part, [version]))
    repository.write(live, repository.text_config(config, version))
    return True


def why_not_loaded(config: Config, servers: dict, run: Run, version: int) -> str | None:
    """Why a server that starts now would not load the champion's files, where the run's would do; None if it would."""
    live = repository.live(config)
    if problem := repository.damage(live, version):
        return problem
    is_loaded = any(live_servers.has_loaded(server, version) for server in servers.values())
    if is_loaded or not build_engine.is_there(config, run):
        return None
    built = files.read_json(build_engine.folder_of(config, run) / "engine.json")
    installed = files.read_json(exchange.classifier(config, version) / "engine.json")
    if build_engine.fit_alike(installed, built):
        return None
    return f"it was built with {build_engine.in_words(installed)}"


def serve_again(config: Config, server, version: int, renewed: bool) -> None:
    """Loads the version in service where a server has lost it, or the files it was loaded from are no more, and sees it
    answer. Raises StepFailed where it fails."""
    from tritonclient.utils import InferenceServerException

    try:
        serves = live_servers.has_loaded(server, version) and server.is_model_ready(repository.TEXT, client_timeout=60)
        if renewed or not serves:
            log.warning("version %d is loaded again: %s", version, "its files are new" if serves else "it was lost")
            server.load_model(repository.TEXT, client_timeout=config.serving.load_timeout_s)
        live_servers.confirm(config, server, version, repository.TEXT)
    except InferenceServerException as error:
        raise StepFailed(
            f"version {version} is in service, but a server does not load it: {error.message()}: its log says more; "
            "start it again, or put another version into service"
        ) from None
