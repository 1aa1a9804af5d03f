"""A swap that is killed before any of its effects, and a Triton killed before any request that changes it.

What changes something outside the process is an effect: a request to Triton, one to the registry, a file or folder
made, renamed or removed. Where between two effects a process is killed makes no difference. Not tried: a kill while
Triton still loads, a first swap, several servers, and a rollback before its end.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading

import pytest
from serving_parts import VERSIONS, answer, ready, remove
from tritonclient.grpc import InferenceServerClient

from tasks.errors import StepFailed
from tasks.promotion import registry
from tasks.serving import repository, swap

# Its children are forked before any gRPC connection is made, with all modules loaded: a second less for each.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["mlflow", "tritonclient.grpc", "tasks.serving.swap", "test_kills"])
FILE_EFFECTS = ("os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir")


class Killer:
    """Kills this process before its `at`-th effect, counted from the first one after `armed` is set."""

    def __init__(self, workspace, at: int, armed: bool = True):
        self.place, self.at, self.armed, self.last = str(workspace / "triton"), at, armed, []
        sys.addaudithook(self.file_effect)
        for name in ("load_model", "unload_model"):
            self.watch(InferenceServerClient, name)
        call = registry.Client.__getattr__
        registry.Client.__getattr__ = lambda client, name: self.registry_effect(name, call(client, name))

    def effect(self, name: str) -> None:
        if not self.armed or self.last == [name, name]:  # of many files in a row two will do
            return
        self.last = [*self.last[-1:], name]
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def file_effect(self, event, arguments):
        if event == "os.mkdir" and os.path.exists(arguments[0]):
            return
        if event in FILE_EFFECTS and (arguments[-1] != -1 or str(arguments[0]).startswith(self.place)):
            self.effect(event)

    def watch(self, owner, name: str) -> None:
        function = getattr(owner, name)

        def first(*arguments, **named):
            self.effect(f"{name} {arguments[1]}")
            return function(*arguments, **named)

        setattr(owner, name, first)

    def registry_effect(self, name: str, call):
        def first(*arguments, **named):
            self.effect(f"{name} {arguments}")
            return call(*arguments, **named)

        return first if name.startswith(("set_", "delete_", "create_")) else call


def swap_until_killed(config, run, at):
    Killer(config.workspace, at)
    swap.run(config, run)


def undo_until_killed(config, run, at):
    """The new version does not answer as it did in `stage`, and going back is what is interrupted."""
    killer, undo = Killer(config.workspace, at, armed=False), swap.undo

    def armed_undo(*arguments):
        killer.armed = True
        undo(*arguments)

    swap.undo = armed_undo
    swap.as_expected = lambda *arguments: False
    try:
        swap.run(config, run)
    except StepFailed:
        pass


@pytest.fixture
def config(config):
    serving = config.serving.model_copy(update={"keep_previous_loaded": True})
    return config.model_copy(update={"serving": serving})


class Asking:
    """A client that asks all the time; it notes what it could not get an answer to."""

    def __init__(self, config):
        self.config, self.failures, self.stop = config, [], threading.Event()
        self.thread = threading.Thread(target=self.ask)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()

    def ask(self):
        while not self.stop.wait(0.02):
            try:
                assert answer(self.config)["version"] in VERSIONS
            except Exception as error:
                self.failures.append(error)


def decided(config, bring, number):
    run, champion = bring(number), registry.alias(config, "champion")
    run.save("decide", {"champion": champion, "reviewer": "ann", "reason": "as agreed", "at": registry.now()})
    return run


def in_service(config) -> int:
    """The version that answers, that the registry calls champion and that a server which starts now would serve."""
    version = answer(config)["version"]
    assert version == registry.alias(config, "champion") == repository.served(repository.live(config))
    assert not swap.journal_file(config).exists()
    return version


def require_swapped(config, old, new):
    assert in_service(config) == new and registry.alias(config, "previous") == old
    assert ready(config) == sorted([old, new])
    assert registry.history(config)[:2] == [new, old]
    assert registry.tags(config, old)["replaced_by"] == str(new)
    assert not {"swap_failed_because", "swap_failed_at"} & registry.tags(config, new).keys()
    live = repository.live(config)
    for part in repository.PARTS:
        written = repository.read(repository.config_file(live, part))
        assert list(written.version_policy.specific.versions) == sorted([old, new])
        assert [folder.name for folder in (live / part).glob(".*") if folder.is_dir()] == []


@pytest.mark.parametrize("target", [swap_until_killed, undo_until_killed])
def test_a_swap_killed_at_any_point_is_finished_or_undone_by_the_next(config, live, bring, target):
    for number in (1, 2):
        swap.run(config, decided(config, bring, number))
    old, points = 2, 0
    with Asking(config) as client:
        for at in itertools.count(1):
            new = old % 3 + 1
            run = decided(config, bring, new)
            if new in repository.installed(repository.live(config)):
                remove(config, new)  # it comes as a new version would
            process = FORKSERVER.Process(target=target, args=(config, run, at))
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            assert answer(config)["version"] in (old, new)
            if at % 2:  # what the next start finds is made whole first, and then the swap begins anew
                with registry.lease(config, "test"), swap.live_servers(config) as servers:
                    swap.finish_or_undo(config, servers)
                assert in_service(config) in (old, new)
            assert swap.run(config, run)["served_version"] == new
            require_swapped(config, old, new)
            old = new
            if process.exitcode == 0:
                break
            points += 1
    assert client.failures == []
    assert points > 10


class TritonKiller:
    """Kills the server before the `at`-th request that changes it, or that the first golden message is sent with."""

    def __init__(self, monkeypatch, live, at: int):
        self.live, self.at, self.last = live, at, None
        for name in ("load_model", "unload_model", "infer"):
            monkeypatch.setattr(InferenceServerClient, name, self.watched(name, getattr(InferenceServerClient, name)))

    def watched(self, name, function):
        def first(client, model, *arguments, **named):
            if (name, model) != self.last or name != "infer":
                self.at -= 1
                if self.at == 0:
                    self.live.kill()
            self.last = (name, model)
            return function(client, model, *arguments, **named)

        return first


def test_a_triton_killed_at_any_point_of_a_swap_serves_what_is_committed(config, live, bring, monkeypatch):
    for number in (1, 2):
        swap.run(config, decided(config, bring, number))
    old = 2
    for at in itertools.count(1):
        new = old % 3 + 1
        run = decided(config, bring, new)
        with monkeypatch.context() as patched:
            killer = TritonKiller(patched, live, at)
            if (failure := failure_of(swap.run, config, run)) is None:
                assert killer.at > 0
                break
        committed = repository.served(repository.live(config))
        said = {old: f"version {new} is not put into service", new: f"version {new} is in service, but not all"}
        assert str(failure).startswith(said[committed])
        live.start("/v2/models/toxic_text/ready")
        assert answer(config)["version"] == committed
        assert swap.run(config, run)["served_version"] == new
        require_swapped(config, old, new)
        old = new
    assert at > 10
    require_swapped(config, old, new)


def failure_of(function, *arguments):
    try:
        function(*arguments)
    except StepFailed as failure:
        return failure
