"""The servers that answer clients: what they have loaded, and whether it answers as it should."""

from contextlib import ExitStack, contextmanager

from tasks import proxies
from tasks.config import Config
from tasks.errors import StepFailed
from tasks.labels import LABELS, TYPES
from tasks.serving import client, repository, triton


@contextmanager
def connect(config: Config):
    """gRPC clients of all live servers, by address; nothing may change before every one has answered.

    Raises:
        StepFailed: one does not answer, or serves a model that was copied in by hand.
    """
    with ExitStack() as stack:
        servers = {url: stack.enter_context(client.connect(url)) for url in config.serving.urls}
        for url, server in servers.items():
            require_answer(url, server)
        yield servers


def require_answer(url: str, server) -> None:
    from tritonclient.utils import InferenceServerException

    try:
        name = server.get_server_metadata(client_timeout=10).name
    except InferenceServerException as error:
        if client.speaks_http(url):
            raise StepFailed(f"{url} {client.HTTP_THERE}; correct serving.urls or TRITON_URL") from None
        raise StepFailed(
            f"the live Triton at {url} does not answer ({error.message()}){proxies.in_the_way(url)}: `make demo` or "
            "./start_triton_server.sh starts it; serving.urls or TRITON_URL names others, or leaves it out"
        ) from None
    if name == triton.BY_HAND:
        raise StepFailed(
            f"the Triton at {url} serves a model.onnx copied in by hand: stop it, and start "
            "`python -m tasks.serving.triton`, which serves what swap brings"
        )


def has_loaded(server, version: int) -> bool:
    return all(is_ready(server, part, version) for part in repository.PARTS)


def is_ready(server, part: str, version: int) -> bool:
    return server.is_model_ready(part, str(version), client_timeout=60)


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
