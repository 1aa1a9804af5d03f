"""What serves, whatever hands have done in the registry.

The live repository says which version a server answers as, and its engine's hash which model that is; a number alone
does not: a registry that is made anew counts from 1 again. Of what serves, the registry's alias `champion` is only a
copy. People can delete or move it, so no step takes its word: each asks here, and swap and rollback set it again.

Nor is a version believed that no step has signed. What serves stays known by its engine then, and is compared with what
the live repository, which only steps write, says that it was made of.
"""

import logging
from dataclasses import dataclass, replace

from tasks import run as runs
from tasks.config import Config
from tasks.errors import StepFailed, UsageError
from tasks.promotion import registry, signatures
from tasks.promotion.refusals import address
from tasks.run import Run
from tasks.serving import repository  # what its files say, no more: of serving's own modules it needs none

log = logging.getLogger(__name__)

SHORT = 12  # characters of a hash in a sentence
SERVED = "served_sha256"  # tag: the engine with which a version came into service last; it may be built again since
# Tags that engine.json holds too. The last is of versions that are signed alone.
ORIGIN = ("run_id", "checkpoint_sha256", "model_version", "data_version", "model_sha256")
REPAIR = "`python commands.py swap --repair`"


@dataclass(frozen=True)
class Serving:
    """What serves, and what the registry knows of it."""

    number: int  # the version that it answers as
    engine: str | None  # its SHA-256; None: nothing is in the live repository here, and only the registry says so
    version: int | None  # the registry's version that it is; None: the registry has none of that number and engine
    champion: int | None  # the version that the registry calls so
    history: tuple[int, ...]  # see registry.history
    run_id: str | None  # the run that made it, where that is known
    elsewhere: tuple[str, int] | None  # registered model and version with the same model, where `version` won't do
    warning: str | None  # why the registry is not right about it, and what helps
    unsigned: str | None = None  # why what the registry says of `version` is not to be believed, and what helps
    from_before: bool = False  # it is not, but was put into service before versions were signed

    @property
    def on_disk(self) -> bool:
        return self.engine is not None

    def __str__(self) -> str:
        return f"version {self.number} (engine {self.engine[:SHORT]})" if self.engine else f"version {self.number}"


def find(config: Config) -> Serving | None:
    """What serves now, or None where nothing does."""
    live, champion = repository.live(config), registry.alias(config, "champion")
    number = repository.served(live)
    if number is None:
        return champion and only_registered(config, champion)
    versions = registry.versions(config)
    records = {int(version.version): version for version in versions}
    known = {number: version.tags for number, version in records.items()}
    is_it = number in known and is_same(config, number, known[number])
    built = repository.engine(live, number)
    unsigned = signatures.problem(config.workspace, records[number]) if is_it else None
    run_id = built.get("run_id") or known.get(number, {}).get("run_id") if is_it else built.get("run_id")
    serving = Serving(
        number=number,
        engine=built.get("sha256", "unknown"),
        version=number if is_it else None,
        champion=champion,
        history=believed_history(config, versions),
        run_id=run_id or run_that_built(config, built),
        elsewhere=None if is_it and not unsigned else same_model(config, built, versions),
        warning=None,
        unsigned=unsigned,
        from_before=bool(unsigned) and is_from_before(records[number], built),
    )
    believed = champion in signed(config, versions)
    return replace(serving, warning=complaint(config, serving, known.get(number), believed))


def only_registered(config: Config, champion: int) -> Serving:
    """The champion where the live repository serves nothing: it was lost, or is not in this workspace. Where the
    registry is not to be believed about it, the last version that it is to be believed about; else nothing of it is
    taken."""
    record = registry.version(config, champion)
    if unsigned := signatures.problem(config.workspace, record):
        versions = registry.versions(config)
        good = signed(config, versions)
        last = next((number for number in registry.in_order_of_service(versions) if number in good), None)
        if last is None:
            return Serving(champion, None, None, champion, (), None, None, unsigned, unsigned)
        warning = f"{unsigned}. Nothing serves here, so version {last} is taken, the last to serve which is signed"
        return replace(only_registered(config, last), champion=champion, warning=warning)
    warning = None
    if "served_at" not in record.tags:
        warning = (
            f"the registry calls version {champion} champion, but nothing serves, and it never did: remove the alias "
            f"in MLflow; to put version {champion} into service, trigger toxicity_release for it"
        )
    return Serving(champion, None, champion, champion, (), record.tags.get("run_id"), None, warning)


def is_from_before(version, built: dict) -> bool:
    """Whether a version lacks a signature because it was put into service before there were any: what serves then does
    not know the files that are signed since."""
    signed = [kind for kind in signatures.KINDS if f"{signatures.PREFIX}{kind}" in version.tags]
    return "model_sha256" not in built and "register" not in signed


def history(config: Config) -> tuple[int, ...]:
    """As registry.history, but only of versions which that is to be believed about."""
    return believed_history(config, registry.versions(config))


def believed_history(config: Config, versions: list) -> tuple[int, ...]:
    """Those of the versions that have served and are good, the last one first: by what is signed, or is in the live
    repository, where only swap puts a version."""
    believed = signed(config, versions) | set(repository.installed(repository.live(config)))
    return tuple(number for number in registry.in_order_of_service(versions) if number in believed)


def signed(config: Config, versions: list) -> set[int]:
    """Those of the versions that the registry is to be believed about."""
    return {int(version.version) for version in versions if signatures.problem(config.workspace, version) is None}


# Whether it is the same -----------------------------------------------------------------------------------------------


def is_same(config: Config, number: int, tags: dict[str, str]) -> bool:
    """Whether what is installed as version `number` is the registry's version with these tags."""
    built = repository.engine(repository.live(config), number)
    if built.get("sha256", "unknown") in (tags.get("engine_sha256"), tags.get(SERVED)):
        return True
    checkpoints = built.get("checkpoint_sha256"), tags.get("checkpoint_sha256")
    if all(checkpoints):
        return checkpoints[0] == checkpoints[1]
    # An engine of before it held its origin, built again since: its run tells, or that this registry had it in service.
    made_by = run_that_built(config, built)
    return "served_at" in tags or (made_by is not None and made_by == tags.get("run_id"))


def run_that_built(config: Config, built: dict) -> str | None:
    """The training whose run folder holds this very engine's hash, or None."""
    for run in runs.opened(config.workspace):
        if run.has("build_engine") and run.has("register"):
            if run.result("build_engine")["sha256"] == built.get("sha256"):
                return run.id
    return None


def same_model(config: Config, built: dict, known: list) -> tuple[str, int] | None:
    """Where the registry has the same model under another number, or another name: it was renamed, say. A version that
    is not signed, under this name or its own, is none."""
    name = config.mlflow.registered_model
    keys = {"checkpoint_sha256": built.get("checkpoint_sha256"), "engine_sha256": built.get("sha256")}
    for version in sorted(known, key=lambda version: -int(version.version)):
        if any(value and version.tags.get(key) == value for key, value in keys.items()):
            if signatures.problem(config.workspace, version) is None:
                return name, int(version.version)
    for key, value in keys.items():
        for version in registry.versions(config, f"tag.{key}='{value}'") if value else []:
            if signatures.problem(config.workspace, version, names=(name, version.name)) is None:
                return version.name, int(version.version)
    return None


def made_of(config: Config, serving: Serving) -> str | None:
    """The content hash of the checkpoint that what serves was made of, as its engine says; None: of before it did."""
    return repository.engine(repository.live(config), serving.number).get("checkpoint_sha256")


def is_another_model(config: Config, number: int, tags: dict[str, str]) -> bool:
    """Whether the live repository holds another model under this version's number."""
    return number in repository.installed(repository.live(config)) and not is_same(config, number, tags)


def complaint(config: Config, serving: Serving, tags: dict[str, str] | None, believed: bool) -> str | None:
    """What the registry has wrong, and what helps; None where it calls what serves champion.

    Args:
        tags: of the registry's version of the number that serves; None: there is none.
        believed: whether steps have signed the version that the registry calls champion.
    """
    name = config.mlflow.registered_model
    if serving.version is not None and serving.champion == serving.version:
        return None
    if serving.version is not None and serving.champion is None:
        return (
            f"{serving} serves, but has lost the alias champion, which a hand has removed: {REPAIR} sets it again, "
            "as the next swap or rollback does"
        )
    if serving.version is not None:
        release = f"to put version {serving.champion} into service, trigger toxicity_release for it"
        forged = f"version {serving.champion} is not what steps have signed, so nothing puts it into service"
        return (
            f"{serving} serves, but the registry calls version {serving.champion} champion, to which a hand has moved "
            f"the alias: {REPAIR} sets it back, as the next swap or rollback does; {release if believed else forged}"
        )
    if serving.elsewhere and serving.elsewhere[0] != name:
        other, number = serving.elsewhere
        return (
            f"{serving} serves, which the registry has as version {number} of {other}, not of {name}: rename {other} "
            f"back in MLflow, or set mlflow.registered_model={other}"
        )
    also = f"; the same model is version {serving.elsewhere[1]} there" if serving.elsewhere else ""
    if tags is not None:
        engine = tags.get("engine_sha256", "none was built")[:SHORT]
        what = f"but version {serving.number} of {name} in the registry is another model (engine {engine}){also}"
    else:
        what = f"but {name} in the registry has no version {serving.number}: it was deleted there{also}"
    return (
        f"{serving} serves, {what}, or {address(config)} is another registry than the one that it came from. It goes "
        "on serving until another version takes its place: bring the registry back, or put a version into service "
        "with toxicity_weekly or toxicity_release"
    )


def warn(config: Config) -> Serving | None:
    """What serves, as `find` says; what the registry has wrong about it becomes a line of the log."""
    serving = find(config)
    if serving and serving.warning:
        log.warning("%s", serving.warning)
    if serving and serving.unsigned and serving.unsigned != serving.warning:
        log.warning("%s goes on serving: %s", serving, serving.unsigned)
    return serving


# What follows ---------------------------------------------------------------------------------------------------------


def champion(config: Config) -> int | None:
    """The registry's version that serves, whatever the alias says; None: nothing does, or nothing that it knows."""
    serving = find(config)
    return serving and serving.version


def require_champion(config: Config, version: int, expected: int | None) -> None:
    """Raises StepFailed where another version has come into service than the one that a version was compared with."""
    now = champion(config)
    if now not in (expected, version):
        raise StepFailed(
            f"the decision on version {version} fell while {registry.named(expected)} was champion; now it is "
            f"{registry.named(now)}: compare with that one (`python commands.py evaluate`, and the steps after it), or "
            f"trigger toxicity_release for version {version}"
        )


def require_own_number(config: Config, version: int) -> None:
    """Raises UsageError where another model serves under this version's number: a server can't have both, and what
    serves is never taken away for it."""
    serving = find(config)
    if serving and serving.on_disk and serving.number == version and serving.version != version:
        engine = registry.tags(config, version).get("engine_sha256", "none built yet")[:SHORT]
        raise UsageError(
            f"{serving} serves, and is another model than version {version} of this registry (engine {engine}): under "
            "one number a server can't have both, and what serves goes on. In the run that trained it, run `python "
            "commands.py register` and the steps after it, which gives this model a number of its own; or put another "
            "version into service first"
        )


def repair(config: Config) -> Serving | None:
    """Sets `champion` and `previous` to what serves and what served before it, where a hand has removed or moved them.

    Only under the lease. Returns what serves; its warning is what was wrong before, and can not be mended where the
    registry does not have what serves.
    """
    serving = find(config)
    if serving is None or not serving.on_disk or serving.version is None:
        return serving
    if serving.champion != serving.version:
        log.warning("%s serves, and had lost the alias champion to a hand: it is set again", serving)
        registry.set_alias(config, "champion", serving.version)
        serving = replace(serving, champion=serving.version)
    if serving.version in serving.history:  # else the registry is of before it kept what served
        before = next((version for version in serving.history if version != serving.version), None)
        if registry.alias(config, "previous") != before:
            log.warning("the alias previous is set again, to %s", registry.named(before))
            if before is not None:
                registry.set_alias(config, "previous", before)
            else:
                registry.delete_alias(config, "previous")
    return serving


def protected_runs(config: Config) -> set[str]:
    """Ids of the runs whose version serves or carries an alias: their folders are kept."""
    serving = find(config)
    named = {registry.tags(config, number).get("run_id", "") for number in registry.aliased(config)}
    return named | ({serving.run_id} if serving and serving.run_id else set())


def run_of(config: Config, serving: Serving | None) -> Run | None:
    """The run that made what serves, where its folder is still there."""
    found = runs.find(config.workspace, serving.run_id) if serving and serving.run_id else None
    return found if found and found.folder.exists() else None


def model_version(config: Config, serving: Serving) -> str | None:
    """DVC's MD5 of the checkpoint that what serves was made of, where its engine or its run says so."""
    if known := repository.engine(repository.live(config), serving.number).get("model_version"):
        return known
    run = run_of(config, serving)
    return run.result("register")["model_version"] if run and run.has("register") else None


def named_by_service(config: Config) -> dict[str, str]:
    """DVC's MD5s of the data and the models of all versions that are installed in the live repository, and what they
    are of."""
    live, named = repository.live(config), {}
    for number in repository.installed(live):
        engine = repository.engine(live, number)
        for key in ("data_version", "model_version"):
            if engine.get(key):
                named[engine[key]] = f"{key} of version {number}, which is installed"
    return named
