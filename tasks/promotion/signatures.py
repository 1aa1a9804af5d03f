"""Signatures of what the steps write into the registry, so that its tags are believed only where a step wrote them.

Whoever may write to MLflow can write any tag, alias or version there. A step therefore signs what it writes with a key
that only the steps have (Ed25519), and every step that reads it checks that first. docs/signatures.md says what is
signed, where the keys are, and what a wrong signature stops.

A version's own code needs this module to check the checkpoint that it loads, so nothing here imports MLflow.
"""

import base64
import hashlib
import json
import logging
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tasks import files
from tasks.errors import Unsuitable, UsageError

log = logging.getLogger(__name__)

PRIVATE, PUBLIC = "TOXIC_SIGNING_KEY", "TOXIC_VERIFY_KEY"  # environment; the second may name several, with commas
PREFIX = "signature_"  # of the tag that holds the signature of a kind of facts
FORMAT = 1  # of a statement
IN_FOLDER = "signature.json"  # in a version's checkpoint: of its files, for who loads it without the registry

# The kinds of facts by the step that writes them, each with the tags that say it. The last tag is written last, after
# the signature: as long as it is missing, there is no such fact, whatever a killed step has left.
KINDS = {
    "register": (
        *("run_id", "profile", "data_version", "raw_version", "model_version", "fingerprint", "git_commit"),
        *("dag_run_url", "base_model", "base_sha256", "thresholds"),
        *("f1_toxic", "f1_types", "baseline_f1_toxic", "baseline_f1_types", "model_sha256", "checkpoint_sha256"),
    ),
    "gate": (
        *("gate_missed", "gate_warned", "gate_overrides", "gate_overridden_by", "gate_overridden_why"),
        *("gate_group", "gate_limits", "gate"),
    ),
    "decide": ("decided_by", "decided_at", "decided_why", "decision"),
    "release": ("released_despite", "released_by", "released_why", "released_at"),  # decide's, for toxicity_release
    "build_engine": ("engine", "tensorrt", "gpu", "engine_sha256"),
    "swap": ("served_sha256", "served_at"),
    "rollback": ("rolled_back_by", "rolled_back_because", "rolled_back_at"),
    "verdict": ("verdict",),
    "sign": ("signed_by", "signed_because", "signed_at"),
}


class Unsigned(Unsuitable):
    """What the registry says of a version was not written by a step, or has been changed since."""


# Keys -----------------------------------------------------------------------------------------------------------------


def folder(workspace: Path) -> Path:
    """Where the workspace's own keys are: `private_key`, of mode 0600, and `public_key`."""
    return workspace / "signing"


def signing_key(workspace: Path) -> Ed25519PrivateKey:
    """The private key: TOXIC_SIGNING_KEY, else the workspace's own, which is made once. Its public half is left in the
    workspace for whoever only reads.

    Raises:
        UsageError: it is no key; or there is none, and this process is to check signatures, not to make them.
    """
    private, public = folder(workspace) / "private_key", folder(workspace) / "public_key"
    if text := os.environ.get(PRIVATE):
        key = Ed25519PrivateKey.from_private_bytes(key_bytes(text, PRIVATE))
    else:
        if not private.exists():
            make(private, public)
        key = Ed25519PrivateKey.from_private_bytes(key_bytes(private.read_text(encoding="ascii"), str(private)))
    mine = in_letters(key.public_key().public_bytes_raw())
    if not public.exists() or public.read_text(encoding="ascii").strip() != mine:
        files.write_text(public, f"{mine}\n")
    return key


def make(private: Path, public: Path) -> None:
    """Writes a new private key, unless another process has meanwhile."""
    import fcntl  # whoever only reads may do that on Windows

    private.parent.mkdir(parents=True, exist_ok=True)
    with (private.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if private.exists():
            return
        if os.environ.get(PUBLIC) or public.exists():
            where = PUBLIC if os.environ.get(PUBLIC) else public
            raise UsageError(
                f"nothing can be signed here: {where} says that versions are signed, but the private key is missing: "
                f"set {PRIVATE}, or bring {private} back from a backup; docs/signatures.md says how to change the key"
            )
        beside = private.with_name(".private_key.new")
        beside.unlink(missing_ok=True)  # of a killed process
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(in_letters(Ed25519PrivateKey.generate().private_bytes_raw()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        beside.rename(private)
        log.info("made the key with which this workspace's versions are signed: %s", private)


def verify_keys(workspace: Path) -> dict[str, Ed25519PublicKey]:
    """The public keys whose signatures count, by their ids: this process' own, and those that TOXIC_VERIFY_KEY names;
    without either the workspace's.

    Raises:
        UsageError: one of them is no key.
    """
    texts = {PUBLIC: text for text in [os.environ.get(PUBLIC)] if text}
    private, public = folder(workspace) / "private_key", folder(workspace) / "public_key"
    keys = []
    if text := os.environ.get(PRIVATE):
        keys = [Ed25519PrivateKey.from_private_bytes(key_bytes(text, PRIVATE)).public_key()]
    elif os.access(private, os.R_OK):
        text = private.read_text(encoding="ascii")
        keys = [Ed25519PrivateKey.from_private_bytes(key_bytes(text, str(private))).public_key()]
    elif not texts and public.exists():
        texts = {str(public): public.read_text(encoding="ascii")}
    for where, text in texts.items():
        for part in text.replace(",", " ").split():
            keys.append(Ed25519PublicKey.from_public_bytes(key_bytes(part, where)))
    return {key_id(key): key for key in keys}


def key_id(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:8]


def key_bytes(text: str, where: str) -> bytes:
    """The 32 bytes of a key in URL-safe base64, as `docker/secrets.sh` writes it: with or without `=` at its end."""
    try:
        found = base64.b64decode(text.strip().rstrip("=") + "=", altchars=b"-_", validate=True)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise UsageError(
            f"{where} holds no key: 32 bytes in URL-safe base64 (43 letters) are one; docs/signatures.md says how to "
            "make it"
        )
    return found


def in_letters(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode("ascii").rstrip("=")


# Statements -----------------------------------------------------------------------------------------------------------


def statement(kind: str, model: str, version: int | None, values: dict[str, str]) -> bytes:
    """What is signed, as canonical JSON. It names model and version, so that it says nothing about any other."""
    of = {"format": FORMAT, "kind": kind, "model": model, "version": version, "values": values}
    return json.dumps(of, sort_keys=True, separators=(",", ":")).encode("ascii")


def facts(version, kind: str) -> dict[str, str]:
    """What the registry says of a version (MLflow's record) that a signature of this kind is of."""
    found = {name: version.tags[name] for name in KINDS[kind] if name in version.tags}
    return found | {"source": version.source} if kind == "register" else found


def signature(workspace: Path, said: bytes) -> str:
    """The signature of a statement, and before it the id of the key."""
    key = signing_key(workspace)
    return f"{key_id(key.public_key())}.{in_letters(key.sign(said))}"


def why_wrong(workspace: Path, said: bytes, written: str) -> str | None:
    """Why a signature is not one of this statement; None where it is."""
    keys = verify_keys(workspace)
    by, _, letters = written.partition(".")
    if not keys:
        return f"there is no key here to check it with (set {PUBLIC}, or TOXIC_WORKSPACE to the workspace's folder)"
    if by not in keys:
        return f"it was made with another key ({by[:8]!r}; here count {', '.join(keys)})"
    try:
        keys[by].verify(base64.urlsafe_b64decode(letters + "=="), said)
    except (InvalidSignature, ValueError):
        return "it is not of what stands there now: a tag was changed, added or removed, or it is another version's"
    return None


# Versions -------------------------------------------------------------------------------------------------------------


def is_there(version, kind: str) -> bool:
    """Whether the registry says anything of this kind about a version; where it comes from it has to say of each."""
    return kind == "register" or KINDS[kind][-1] in version.tags


def problem_of(workspace: Path, version, kind: str, names: tuple[str, ...] = ()) -> str | None:
    """What is wrong with the signature of facts of one kind that are there, in a few words; None where it is good.

    Args:
        version: MLflow's record of it.
        names: of the registered model, under any of which it may have been signed; else the one it has now.
    """
    written = version.tags.get(f"{PREFIX}{kind}")
    if written is None:
        return f"what {kind} writes about it ({KINDS[kind][-1]}, …) is not signed"
    for name in names or (version.name,):
        said = statement(kind, name, int(version.version), facts(version, kind))
        why = why_wrong(workspace, said, written)
        if why is None:
            return None
    return f"the signature of what {kind} wrote about it ({KINDS[kind][-1]}, …) is wrong: {why}"


def problem(
    workspace: Path, version, needed: tuple[str, ...] = (), but: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> str | None:
    """Why the registry is not to be believed about a version, in a sentence with the way out; None where it is.

    Where it comes from must be signed, and so must everything else that is said of it.

    Args:
        needed: kinds of facts that must be there.
        but: kinds that are not looked at: the caller writes them anew.
        names: see `problem_of`.
    """
    for kind in KINDS:
        if kind in but or not (kind in needed or is_there(version, kind)):
            continue
        if not is_there(version, kind):
            step = "decide" if kind == "release" else kind
            return (
                f"the registry says nothing of {kind} about version {version.version} of {version.name}: run `python "
                f"commands.py {step}` and the steps after it, or trigger toxicity_release"
            )
        if found := problem_of(workspace, version, kind, names):
            return f"version {version.version} of {version.name} is not to be believed: {found}; {way_out(version)}"
    return None


def way_out(version) -> str:
    number = version.version
    return (
        "nothing of it is loaded or put into service. If it is from before versions were signed, or a step was killed "
        "(run that one again), or you know who changed it and vouch for it, look at its tags and run `python "
        f'commands.py sign --version={number} --reason="…"` (--anew for a wrong signature); else delete it in MLflow'
    )


# Files ----------------------------------------------------------------------------------------------------------------


def tree_sha256(place: Path, without: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and SHA-256s of all files in a folder, but for some names at its top."""
    found = {file.relative_to(place).as_posix(): file for file in place.rglob("*") if file.is_file()}
    hashes = {name: files.sha256(file) for name, file in found.items() if name not in without}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode("ascii")).hexdigest()


def sign_folder(workspace: Path, place: Path, model: str) -> None:
    """Leaves a signature of a checkpoint's files among them, for who loads it from wherever it has come to."""
    values = {"files_sha256": tree_sha256(place, (IN_FOLDER,))}
    signed = signature(workspace, statement("checkpoint", model, None, values))
    files.write_json(place / IN_FOLDER, {"model": model, **values, "signature": signed})


def require_folder(workspace: Path, place: Path) -> None:
    """Raises Unsigned unless the files of a checkpoint are those that `register` signed. Nothing of them is loaded."""
    try:
        said = files.read_json(place / IN_FOLDER)
        model, written = str(said["model"]), str(said["signature"])
    except (OSError, ValueError, KeyError, TypeError):
        raise Unsigned(
            f"the checkpoint in {place} is not loaded: it has no {IN_FOLDER} that could be read, so nothing says that "
            "a step wrote it; docs/signatures.md says how to check the version that it came with"
        ) from None
    values = {"files_sha256": tree_sha256(place, (IN_FOLDER,))}
    if why := why_wrong(workspace, statement("checkpoint", model, None, values), written):
        if values["files_sha256"] != said.get("files_sha256"):
            why = "its files are not those that were signed"
        raise Unsigned(f"the checkpoint in {place}, of {model}, is not loaded: {why}; see docs/signatures.md")
