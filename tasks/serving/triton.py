"""The Triton server as a process: in the foreground as the live server, or for the length of a `with` block.

    python -m tasks.serving.triton [--by-hand] [hydra.override=value …]

becomes the live server of the workspace. With --by-hand it serves a model.onnx that a person has copied to
triton_model_repository/toxic_classificator/1/, until that file is taken away again.

A server runs in the folder of its model repository and is told all paths by way of HERE. The Python backend starts its
stub by `bash -c` with the paths unquoted, where a space or a quote in them would keep every model from loading; and the
stub's Python takes any locale for C: an error that names a file with a letter beyond ASCII would end it without a word.
"""

import fcntl
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tasks import files, proxies
from tasks.config import Config
from tasks.errors import StepFailed, UsageError
from tasks.serving import repository

log = logging.getLogger(__name__)

HERE = "/proc/self/cwd"  # the folder that a process runs in, for the server and its models the same one
SHARED_MEMORY = "triton_python_backend_shm_region_"  # what the names of its files begin with
BY_HAND = "toxic by hand"  # the server's name while it serves a model that no `swap` has put there


@dataclass(frozen=True)
class Server:
    """A running server. `url` is its gRPC address."""

    pid: int
    url: str
    http_url: str
    metrics_url: str


def serve(config: Config) -> None:
    """Replaces this process by the live server, which serves the version that the last swap committed, or none yet."""
    models = repository.live(config)
    repository.create(config, models)
    version = repository.served(models)
    log.info("serving %s", f"version {version}" if version else "no version yet: `python commands.py swap` brings one")
    load = []
    if version:
        leave_out_what_may_not_load(config, models, version)
        if is_as_built(models, version):
            say_whether_it_fits(repository.folder(models, repository.CLASSIFIER, version))
            load = [repository.TEXT]
    ports = (config.serving.http_port, config.serving.grpc_port, config.serving.metrics_port)
    # A champion that no longer loads must not keep the server from starting: the next swap repairs it.
    become(config, models, ports, load, "--exit-on-error=false")


def leave_out_what_may_not_load(config: Config, models: Path, version: int) -> None:
    """The version before stays loaded for a quick way back, but where it does not load the server loads none of both.

    On a GPU, memory may be another's by now. In the middle of a swap, the other is one that nobody has proved yet.
    """
    from tasks.serving import exchange

    sound = {version}
    if config.serving.engine != "tensorrt" and not exchange.journal_file(config).exists():
        for other in repository.loaded_at_start(models) - sound:
            if repository.damage(models, other) is None:
                sound.add(other)
    repository.keep_only(models, sound)


def say_whether_it_fits(classifier: Path) -> None:
    """Logs why the server is about to refuse its champion's engine: it names no GPU or version of TensorRT itself."""
    from tasks.serving import build_engine

    try:
        build_engine.require_fit(classifier)
    except StepFailed as error:
        log.error("%s does not fit: %s", classifier, error)


def is_as_built(models: Path, version: int) -> bool:
    """Whether the files are those that were built: a part in Python looks when it loads, Triton at a plan does not."""
    if problem := repository.damage(models, version):
        log.error("version %d is not served: %s", version, problem)
        return False
    return True


def serve_by_hand(config: Config, copied: Path) -> None:
    """Serves a model.onnx that a person has copied into a folder.

    Its tokenizer is the tokenizer.json beside it, or that of the trained model if it is the same; without one, only
    `toxic_classificator` is served.
    """
    models = config.workspace / "triton" / "by_hand"
    with files.new_folder(models) as folder:
        with_text = install_by_hand(config, copied, folder)
    if not with_text:
        log.warning("no tokenizer.json fits %s: only %s is served", copied / "model.onnx", repository.CLASSIFIER)
    ports = (config.serving.http_port, config.serving.grpc_port, config.serving.metrics_port)
    load = [repository.TEXT if with_text else repository.CLASSIFIER]
    become(config, models, ports, load, f"--id={BY_HAND}")


def install_by_hand(config: Config, copied: Path, models: Path) -> bool:
    """Makes a repository with the copied model as its version 1; returns whether a tokenizer came with it."""
    from tasks.serving import build_engine, export_onnx

    settings = export_onnx.settings_of(copied / "model.onnx")
    if settings.get("dtype") == "bfloat16":
        raise UsageError(f"{copied / 'model.onnx'} has bfloat16 weights, for TensorRT: export it with serving=onnx")
    trained = config.workspace / "models" / "finetuned" / "final" / "merged" / "tokenizer.json"
    fitting = [
        file
        for file in (copied / "tokenizer.json", trained)
        if settings and file.is_file() and files.sha256(file) == settings["tokenizer_sha256"]
    ]
    repository.create(config, models)
    with tempfile.TemporaryDirectory() as place:
        engine = Path(place)
        for file in [*copied.glob("model.onnx*"), *fitting[:1]]:
            shutil.copy2(file, engine)
        files.write_json(engine / "settings.json", settings or {"version": 0})
        if fitting:
            build_engine.add_buckets(config, engine / "settings.json")
        build_engine.record(config, engine)
        parts = repository.PARTS if fitting else (repository.CLASSIFIER,)
        repository.install(engine, models, 1, parts)
    repository.write(models, repository.text_config(config, 1))
    return bool(fitting)


def become(config: Config, models: Path, ports, load: list[str], *more: str) -> None:
    arguments, environment = command(config, models, config.serving.listen, ports, load)
    sys.stdout.flush()
    os.chdir(models.parent)
    os.execvpe(arguments[0], [*arguments, *more], environment)


@contextmanager
def running(config: Config, models: Path, folder: Path, load=(repository.TEXT,)):
    """A server of its own on free ports of this machine; it is gone when the block ends, whichever way.

    Args:
        models: the model repository.
        folder: where its log, triton.log, is written.
        load: models that are ready before the block starts.

    Yields:
        Server.

    Raises:
        StepFailed: it does not start; the message quotes its log.
    """
    ports = free_ports(3)
    arguments, environment = command(config, models, "127.0.0.1", ports, load)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "triton.log").open("wb") as output:
        process = subprocess.Popen(
            arguments,
            cwd=models.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        http, metrics = f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[2]}/metrics"
        server = Server(process.pid, f"127.0.0.1:{ports[1]}", http, metrics)
        wait_until_ready(process, server.http_url, folder / "triton.log", config.serving.load_timeout_s)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load(config: Config, server: Server, model: str, log_file: Path) -> None:
    """Loads a model, and those that an ensemble needs. Raises StepFailed, which quotes the log, where it does not."""
    from tritonclient.utils import InferenceServerException

    from tasks.serving import client

    with client.connect(server.url) as connection, futures.ThreadPoolExecutor(1) as pool:
        loading = pool.submit(connection.load_model, model, client_timeout=config.serving.load_timeout_s)
        try:
            while not loading.done():
                futures.wait([loading], timeout=0.5)
                require_stubs(server.pid, log_file)
            loading.result()
        except InferenceServerException as error:
            said = why(log_file) or error.message()
            raise StepFailed(f"Triton can't load {model}: {said}; see {log_file}") from None
        except StubDied:
            kill(server.pid)  # told to end, it would wait for those models; and the call for it
            raise


class StubDied(StepFailed):
    """A process in which a model of the server's was to run has ended before it said a word to the server."""


def require_stubs(pid: int, log_file: Path) -> None:
    """Raises StubDied where a server waits for a model's process that has ended: it would wait for ever.

    It takes note of those that end in the usual way at once; what has ended and is still its child after a second, it
    knows nothing of.
    """
    if ended_children(pid):
        time.sleep(1)
        if left := ended_children(pid):
            raise StubDied(
                f"the process of a model ended as soon as Triton had started it ({len(left)} did): {why(log_file)}; "
                f"see {log_file}"
            )


def ended_children(pid: int) -> set[int]:
    """The children of a process that have ended, and that it has not asked for yet."""
    import psutil

    found = set()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE:
                    found.add(child.pid)
    return found


@contextmanager
def staging_folder(config: Config, run_id: str):
    """An empty folder for the servers that a run is staged in; it is gone when the block ends.

    A process holds a lock on its folder as long as it lives, which the system lets go of however it ends. What is not
    locked is left over: those servers are ended, and their folders removed. Others are left alone.

    Raises:
        StepFailed: another process stages this very run.
    """
    staging = config.workspace / "triton" / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    folder = staging / run_id
    with locked(staging, wait=True):  # one at a time looks round and settles
        for other in [path for path in staging.iterdir() if path.is_dir()]:
            remove_left_over(other)
        if folder.exists():
            raise StepFailed(f"run {run_id} is being staged by another process, in {folder}: wait until it is through")
        folder.mkdir()
        lock = take_lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def locked(folder: Path, wait: bool = False):
    """Holds a folder's lock for the length of the block. Raises BlockingIOError where another process has it."""
    lock = take_lock(folder, wait)
    try:
        yield
    finally:
        os.close(lock)


def take_lock(folder: Path, wait: bool = False) -> int:
    """A descriptor that holds the folder's lock until it is closed; programs that this process starts don't get it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(lock)
        raise
    return lock


def remove_left_over(folder: Path) -> None:
    """Removes a staging folder, and ends the servers on it, unless a living process holds it."""
    with suppress(BlockingIOError, FileNotFoundError), locked(folder):
        end_servers(folder)
        shutil.rmtree(folder, ignore_errors=True)
        log.warning("removed %s, which a killed stage has left", folder)


def end_servers(folder: Path) -> None:
    """Kills servers whose model repository is in a folder, and the processes of their models."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if serves_from(folder, process, process.info["cmdline"] or []):
            log.warning("ending what a killed stage has left: pid %d", process.pid)
            kill(process.pid)


def serves_from(folder: Path, process, words: list[str]) -> bool:
    """Whether a process is Triton, or that of a model, and its repository is in a folder."""
    import psutil

    repositories = [word.partition("=")[2] for word in words if word.startswith("--model-repository=")]
    if any(word.startswith(SHARED_MEMORY) for word in words):
        repositories += [word for word in words if word.endswith("/model.py")]
    if not repositories:
        return False
    try:
        here = Path(process.cwd())
    except (psutil.Error, OSError):  # gone, or another user's
        return False
    found = [here / path.removeprefix(f"{HERE}/") for path in repositories]
    return any(path.is_relative_to(place) for path in found for place in (folder, folder.resolve()))


def kill(pid: int) -> None:
    """Kills a server with the processes of its models, and removes the memory that they share.

    They notice by themselves that their server is gone, but not while they start.
    """
    import psutil

    with suppress(psutil.NoSuchProcess):
        server = psutil.Process(pid)
        tree = [server, *server.children(recursive=True)]
        regions = {Path(path) for process in tree for path in shared_memory(process)}
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)
        for region in regions:
            region.unlink(missing_ok=True)


def shared_memory(process) -> list[str]:
    """The files in /dev/shm by which a server and a model's process exchange tensors."""
    import psutil

    with suppress(psutil.Error, OSError):
        maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
        return re.findall(rf"/dev/shm/{SHARED_MEMORY}[\w-]+", maps)
    return []


def wait_until_ready(process, http_url: str, log_file: Path, timeout_s: float) -> None:
    import httpx

    deadline = time.monotonic() + timeout_s
    with httpx.Client(trust_env=False, timeout=5) as client:  # one for all: each new one reads its certificates
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StepFailed(f"Triton ended with code {process.returncode}: {why(log_file)}; see {log_file}")
            try:
                if client.get(f"{http_url}/v2/health/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
    raise StepFailed(
        f"Triton was not ready within {timeout_s} s: {why(log_file)}; see {log_file}, or raise serving.load_timeout_s"
    )


# What every start says on a machine without a GPU, where nothing is wrong.
WITHOUT_A_GPU = re.compile(r"CUDA driver|CudaDriverHelper|NVML|DCGM|pinned system memory")
# Triton's own errors, and what the shell or the loader of libraries says of a program that does not start.
COMPLAINT = re.compile(
    r"E\d{4} |error:|(/bin/)?(ba)?sh: |Fatal Python error|.*error while loading shared libraries|.*: not found"
)


def why(log_file: Path) -> str:
    """The last complaints in a server's log as it makes them, in one line; what is said of a missing GPU is none,
    unless there is no other."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line for line in lines if line.strip() and not WITHOUT_A_GPU.search(line)]
    complaints = [line for line in told if COMPLAINT.match(line)]
    return " | ".join(line[:400] for line in list(dict.fromkeys(complaints or told or lines))[-3:])


def command(config: Config, models: Path, address: str, ports, load) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a server, which is to be started in the folder that holds the model repository.

    Args:
        ports: HTTP, gRPC and metrics.
        load: models to load at the start.
    """
    binary, options, path = installation(config, models.parent)
    arguments = [
        binary,
        f"--model-repository={HERE}/{models.name}",
        *options,
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",  # the configurations are complete; asking the models takes seconds
        "--strict-readiness=false",
        *(f"--{kind}-address={address}" for kind in ("http", "grpc", "metrics")),
        *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports)),
        *(f"--load-model={model}" for model in load),
    ]
    return arguments, {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def installation(config: Config, folder: Path) -> tuple[str, list[str], str]:
    """The server's binary, the options that tell it where its backends are, and the PATH its models' Python is on.

    Args:
        folder: where the server is started, and finds its backends.
    """
    path = os.environ.get("PATH", os.defpath)
    if config.serving.triton_env is None:
        binary = shutil.which("tritonserver")
        if binary is None:
            raise StepFailed(
                "no tritonserver on PATH: run inside the Triton image, or name an environment that holds "
                "nvidia-pytriton with serving.triton_env=…, or TOXIC_TRITON_ENV (`make envs` makes .venv/triton)"
            )
        return binary, [], path
    environment = Path(config.serving.triton_env).absolute()
    found = sorted(environment.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    if not found:
        raise StepFailed(f"serving.triton_env={environment} holds no Triton server: `make envs` makes .venv/triton")
    options = [f"--backend-directory={HERE}/{backends(folder, found[-1]).name}"]
    link(folder / "env", environment)
    return str(found[-1] / "bin" / "tritonserver"), options, f"{HERE}/env/bin{os.pathsep}{path}"


def backends(folder: Path, server: Path) -> Path:
    """A folder of backends as the server wants it, with links into its environment, which is only read.

    The wheel keeps the Python backend's stub once per Python version, where the server does not look for it.
    """
    python = server.parents[2].name.removeprefix("python")
    target = folder / "backends"
    (target / "python").mkdir(parents=True, exist_ok=True)
    for file in (
        server / "backends" / "python" / "libtriton_python.so",
        server / "backends" / "python" / "triton_python_backend_utils.py",
        server / "python_backend_stubs" / python / "triton_python_backend_stub",
    ):
        link(target / "python" / file.name, file)
    return target


def link(place: Path, target: Path) -> None:
    if not place.is_symlink() or place.readlink() != target:
        place.unlink(missing_ok=True)
        place.symlink_to(target)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def peak_memory(pid: int) -> int:
    """Bytes that a server and the processes of its models have held at most, each counted by itself."""
    import psutil

    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    status = [Path(f"/proc/{process.pid}/status").read_text() for process in tree]
    peaks = [line.split()[1] for text in status for line in text.splitlines() if line.startswith("VmHWM:")]
    return sum(int(kib) * 1024 for kib in peaks)


def main(arguments: list[str]) -> int:
    from tasks.step import prepare_process, without_a_run

    prepare_process()
    overrides = [a for a in arguments if a != "--by-hand"]
    copied = repository.TEMPLATES / repository.CLASSIFIER / "1"
    try:
        proxies.prepare()
        config = without_a_run(overrides)
        if "--by-hand" in arguments and (copied / "model.onnx").is_file():
            log.warning(
                "serving %s, copied in by hand; without it: what the last swap committed", copied / "model.onnx"
            )
            serve_by_hand(without_a_run(["serving=onnx", *overrides]), copied)
        serve(config)
    except (UsageError, StepFailed) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
