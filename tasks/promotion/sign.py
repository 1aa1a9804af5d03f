"""Sign what the registry says of a version: one of before there were signatures, or one that a person vouches for."""

import getpass
import logging

from tasks.config import Config
from tasks.errors import Unsuitable, UsageError
from tasks.promotion import registry, signatures
from tasks.promotion.refusals import Refused
from tasks.training import checkpoint

log = logging.getLogger(__name__)


def run(overrides, version: int, anew: bool, reviewer, reason, config_path, config_name) -> dict:
    """Signs all that is not signed, and records who did so and why.

    Its files in MLflow, if they are still there, are signed with it, its code too: they are read as data, and must hold
    the checkpoint that its tags name.

    Args:
        anew: also what has a wrong signature, after a change of the key or of the registered model's name.

    Returns {"version", "signed": [kind], "facts": {tag: value}, "key": id}; nothing is signed twice.

    Raises:
        UsageError: no reason; or there is no such version.
        Unsigned: a signature is wrong, and `anew` is off.
        Unsuitable: its files are not those that its tags name.
    """
    from tasks.step import without_a_run

    if not reason:
        raise UsageError('sign wants --reason="…", which the registry keeps with your name')
    config = without_a_run(overrides, config_path, config_name)
    found = registry.version(config, version)
    wrong = {kind: why for kind in signatures.KINDS if (why := wrong_of(config, found, kind))}
    if wrong and not anew and any(f"{signatures.PREFIX}{kind}" in found.tags for kind in wrong):
        raise signatures.Unsigned(
            f"version {version} of {found.name} is not signed: {'; '.join(wrong.values())}. Find out who changed it: "
            "delete it in MLflow if you can't; only if you vouch for what its tags say now, add --anew"
        )
    if wrong:
        if "register" in wrong:
            found = complete(config, found)
        who = {"signed_by": reviewer or getpass.getuser(), "signed_because": reason, "signed_at": registry.now()}
        registry.sign(config, version, *wrong)
        registry.record(config, version, **who)
        found = registry.require_signed(config, version)
    facts = {name: value for kind in signatures.KINDS for name, value in signatures.facts(found, kind).items()}
    log.info("version %d: %s signed", version, ", ".join(wrong) or "nothing more is")
    key = signatures.key_id(signatures.signing_key(config.workspace).public_key())
    return {"step": "sign", "version": version, "signed": list(wrong), "facts": facts, "key": key}


def wrong_of(config: Config, version, kind: str) -> str | None:
    there = signatures.is_there(version, kind)
    return signatures.problem_of(config.workspace, version, kind) if there else None


def complete(config: Config, version):
    """The record of a version, which now names the files that MLflow has of it, and its checkpoint.

    Raises:
        Unsuitable: they are not what its tags name.
    """
    number, tags = int(version.version), version.tags
    try:
        with registry.fetched(config, f"models:/{version.name}/{number}") as place:
            found = {
                "model_sha256": registry.files_sha256(place),
                "checkpoint_sha256": checkpoint.content_hash(place / "artifacts" / "checkpoint"),
            }
    except (Refused, OSError) as error:
        said = " ".join(str(error).split())[:200]
        log.warning(
            "MLflow has lost the files of version %d, which are not signed: DVC may have them (%s)", number, said
        )
        return version
    for name, value in found.items():
        if value is None or tags.get(name, value) != value:
            raise Unsuitable(
                f"version {number} of {version.name} is not signed: its files in MLflow have the {name} {value}, but "
                f"its tag says {tags.get(name)}: delete the version in MLflow, and run `python commands.py register` "
                "in its run, or train"
            )
    registry.tag(config, number, **found)
    return registry.version(config, number)
