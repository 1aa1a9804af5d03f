"""Check the signatures and the files of a version before anybody loads it: nothing of it is loaded or run here."""

import logging

from tasks.promotion import registry, signatures
from tasks.training import checkpoint

log = logging.getLogger(__name__)


def run(overrides, version: int, config_path, config_name) -> dict:
    """Checks what the registry says of a version, and whether the files that MLflow has of it, its code and its
    checkpoint, are those that were registered. It needs the public key alone.

    Returns {"version", "model_uri": to load it by, "signed": [kind], "signed_by": who vouches for it, where that is a
    person, "files": SHA-256 of them all, "checkpoint": its content hash}.

    Raises:
        Unsigned: what the registry says was not written by a step.
        Changed: the files are others.
    """
    from tasks.step import without_a_run

    config = without_a_run(overrides, config_path, config_name)
    found = registry.require_signed(config, version)
    with registry.files_of(config, found) as place:
        checkpoint_sha256 = checkpoint.content_hash(place / "artifacts" / "checkpoint")
    if checkpoint_sha256 != found.tags.get("checkpoint_sha256"):
        raise registry.Changed(
            f"the checkpoint of version {version} has the hash {checkpoint_sha256}, signed is "
            f"{found.tags.get('checkpoint_sha256')}"
        )
    log.info("version %d is as the steps have registered it", version)
    return {
        "step": "verify",
        "version": version,
        "model_uri": f"models:/{found.name}/{version}",
        "signed": [kind for kind in signatures.KINDS if signatures.is_there(found, kind)],
        "signed_by": found.tags.get("signed_by"),
        "files": found.tags["model_sha256"],
        "checkpoint": checkpoint_sha256,
    }
