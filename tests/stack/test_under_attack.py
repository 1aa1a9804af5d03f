"""What reaches the gateway without a login, while clients go on asking: the stack as test_stack.py has left it."""

import json
import re
import resource
import time
from contextlib import suppress

import httpx
import numpy as np
import pytest
from asking import Clients
from attacks import INFER, bomb, hold_slow_sockets, in_parallel, post
from conftest import answers, figure, kill_main_process, wait_for
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.timeout(600)

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def quiet(stack, served) -> float:
    """p99 of the same clients before any attack, in seconds."""
    with Clients(stack.url("TRITON_HTTP_PORT"), kept=2, new=2) as clients:
        clients.stopped.wait(10)
    assert clients.failures == []
    figure("attack_p99_before", 1000 * clients.p99(), "ms")
    return clients.p99()


@pytest.fixture
def unharmed(stack, quiet, request):
    """Clients ask during the test; at its end none of them has met a failure, and Triton is the one that it was."""
    before = started(stack, "triton-cpu")
    with Clients(stack.url("TRITON_HTTP_PORT"), kept=2, new=2) as clients:
        yield
    assert clients.failures == [] and len(clients.seconds) > 10
    assert started(stack, "triton-cpu") == before
    figure(f"attack_p99_{request.node.name.removeprefix('test_')}", 1000 * clients.p99(), "ms")


def started(stack, service: str) -> str:
    form = "{{.RestartCount}} {{.State.StartedAt}}"
    return stack.run("docker", "inspect", f"--format={form}", stack.container(service)).stdout


def test_bodies_that_unpack_to_gigabytes_are_refused(stack, unharmed):
    body = bomb(1536 * MEBIBYTE)
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    assert in_parallel(4, lambda: post(stack.ports["TRITON_HTTP_PORT"], body, headers)) == [400] * 4


def test_bodies_that_are_too_large_are_refused(stack, unharmed):
    too_large, chunks = b" " * (64 * MEBIBYTE), [b" " * MEBIBYTE] * 64
    port = stack.ports["TRITON_HTTP_PORT"]
    for _ in range(10):  # each is over in a moment
        assert in_parallel(20, lambda: post(port, too_large, {})) == [413] * 20
        assert in_parallel(20, lambda: post(port, iter(chunks), {})) == [411] * 20
        time.sleep(0.2)


def test_large_bodies_that_fit_are_taken_a_few_at_a_time(stack, unharmed):
    """They are work, and whoever asks meanwhile waits for it."""
    fits, port = question(*["a" * MEBIBYTE] * 4), stack.ports["TRITON_HTTP_PORT"]
    assert in_parallel(20, lambda: post(port, fits, {})) == [200] * 20
    no_messages = b'{"inputs": [' + b"0," * (4 * MEBIBYTE - 16) + b"0]}"  # ten times as much once it is parsed
    assert in_parallel(20, lambda: post(port, no_messages, {})) == [400] * 20


@pytest.mark.parametrize(
    ("port", "send"),
    [
        ("TRITON_HTTP_PORT", b"GET /v2/health/live HTTP/1.1\r\nHost: "),
        ("TRITON_HTTP_PORT", b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n"),
        ("TRITON_GRPC_PORT", b"PRI * HTTP/2.0\r\n\r\n"),
        ("TRITON_METRICS_PORT", b"GET /metrics HTTP/1.1\r\nHost: "),
    ],
    ids=["headers", "bodies", "grpc", "metrics"],
)
def test_slow_sockets_shut_nobody_out(stack, unharmed, port, send):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    try:
        assert hold_slow_sockets(stack.ports[port], 2500, 13, send) >= 2500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def question(*texts: str) -> bytes:
    message = {"name": "text", "datatype": "BYTES", "shape": [len(texts), 1], "data": [[text] for text in texts]}
    return json.dumps({"inputs": [message]}).encode()


def test_triton_has_memory_left(stack, quiet):
    """After what stands above, the largest bodies that it is handed among it."""
    program = "cat /sys/fs/cgroup/memory.peak /sys/fs/cgroup/memory/memory.max_usage_in_bytes 2>/dev/null"
    peak = int(stack.compose("exec", "-T", "triton-cpu", "sh", "-c", program, check=False).stdout)
    limit = int(stack.run("docker", "inspect", "--format={{.HostConfig.Memory}}", stack.container("triton-cpu")).stdout)
    figure("attack_triton_memory", peak / MEBIBYTE, "MiB")
    assert peak < limit / 2


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (question("hello"), {}, 200, "answer"),
        (question("hello"), {"Content-Encoding": "identity"}, 200, "answer"),
        (question("hello"), {"Content-Encoding": "br"}, 400, "Content-Encoding is not taken"),
        (question("hello"), {"Content-Encoding": "x"}, 400, "Content-Encoding is not taken"),
        (b"", {}, 400, "the request has no body"),
        (iter([b""]), {}, 400, "the request has no body"),
        (iter([question("hello")]), {}, 200, "answer"),
        (question("a" * MEBIBYTE), {}, 200, "answer"),
        (question("a" * MEBIBYTE + "b"), {}, 400, "1048577 bytes"),
        (question("a" * 8 * MEBIBYTE), {}, 413, "more than 8 MiB"),
    ],
)
def test_a_request_is_answered_or_refused_in_words(stack, served, body, headers, status, says):
    found = httpx.post(stack.url("TRITON_HTTP_PORT", INFER), content=body, headers=headers, timeout=60)
    assert found.status_code == status and says in found.text


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (b"hello", {}, None),
        (b"a" * MEBIBYTE, {}, None),
        (b"a" * 9 * MEBIBYTE, {}, "RESOURCE_EXHAUSTED|RST_STREAM"),  # the end may come before the words
        (b"hello", {"compression_algorithm": "gzip"}, "compression is not taken"),
    ],
)
def test_grpc_has_the_same_bounds(stack, served, text, options, says):
    message = InferInput("text", [1, 1], "BYTES")
    message.set_data_from_numpy(np.array([[text]], dtype=object))
    address = f"127.0.0.1:{stack.ports['TRITON_GRPC_PORT']}"
    with InferenceServerClient(address, channel_args=[("grpc.max_send_message_length", 2**26)]) as triton:
        if says is None:
            assert triton.infer("toxic_text", [message], **options).as_numpy("answer").size == 1
            return
        with pytest.raises(InferenceServerException, match=says):
            triton.infer("toxic_text", [message], **options)


def test_streams_over_grpc_are_refused(stack, served):
    answers = []
    message = InferInput("text", [1, 1], "BYTES")
    message.set_data_from_numpy(np.array([[b"hello"]], dtype=object))
    with InferenceServerClient(f"127.0.0.1:{stack.ports['TRITON_GRPC_PORT']}") as triton:
        triton.start_stream(callback=lambda result, error: answers.append(str(error)))
        with suppress(InferenceServerException):  # it may be refused before the first message
            triton.async_stream_infer("toxic_text", [message])
        triton.stop_stream()
    # The end of the stream may come before the words.
    assert len(answers) == 1 and re.search("use ModelInfer|RST_STREAM", answers[0])


@pytest.mark.parametrize(("service", "program"), [("gateway", b"haproxy"), ("triton-cpu", b"tritonserver")])
def test_what_is_killed_answers_again_by_itself(stack, served, service, program):
    version = answers(stack)
    kill_main_process(stack, service, program)
    killed = time.monotonic()
    assert wait_for(lambda: answers(stack), 120) == version
    figure(f"seconds_without_{service}", time.monotonic() - killed)
    stack.wait_healthy()
