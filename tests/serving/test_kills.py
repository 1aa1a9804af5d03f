"""A swap that is killed before any of its effects, and a Triton killed before any request that changes it.

What changes something outside the process is an effect: a request to Triton, one to the registry, a file or folder
renamed, linked or removed. Where between two effects a process is killed makes no difference, but while a model loads.
Files are made under temporary names first, so that what a killed process leaves of one is there before its renaming.
A first swap and a rollback do to files what a swap does: they are killed before their requests alone, and of those to
two servers before one of each kind.
"""

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading

import pytest
from serving_parts import VERSIONS, answer, changed, decided, each, overrides, put_in_service, ready
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from tasks.errors import StepFailed
from tasks.promotion import registry
from tasks.serving import exchange, live_servers, repository, rollback, swap

pytestmark = pytest.mark.timeout(1800)  # a test is a series of some dozens of kills, each with servers to start

# Its children are forked before any gRPC connection is made, with all modules loaded: a second less for each.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["mlflow", "tritonclient.grpc", "tasks.serving.swap", "test_kills"])
FILE_EFFECTS = ("os.rename", "os.link", "os.remove", "os.rmdir")
REQUESTS = ("load_model", "unload_model")
TO_THE_REGISTRY = ("set_", "delete_")
# One of each kind that a swap asks of a server: a part comes beside or goes, the trial ends, the ensemble is tied.
KINDS_OF_REQUESTS = ("load_model toxic_classificator", "unload_model toxic_trial", "load_model toxic_text")
WHILE_IT_LOADS = 0.05  # seconds after a request to load a model has been sent; the loading takes longer


class Killer:
    """Kills this process before its `at`-th effect, counted from the first one after `armed` is set.

    Args:
        of: counts only effects whose names begin with one of these.
        after: seconds by which the kill follows the begin of the effect.
    """

    def __init__(self, workspace, at: int, armed: bool = True, of: tuple[str, ...] = ("",), after: float = 0):
        self.place, self.at, self.armed, self.last = str(workspace / "triton"), at, armed, []
        self.of, self.after = of, after
        sys.addaudithook(self.file_effect)
        for name in REQUESTS:
            self.watch(InferenceServerClient, name)
        call = registry.Client.__getattr__
        registry.Client.__getattr__ = lambda client, name: self.registry_effect(name, call(client, name))

    def effect(self, name: str) -> None:
        if not self.armed or not name.startswith(self.of) or self.last == [name, name]:
            return  # of many alike in a row two will do
        self.last = [*self.last[-1:], name]
        self.at -= 1
        if self.at == 0 and self.after:
            threading.Timer(self.after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif self.at == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def file_effect(self, event, arguments):
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
            self.effect(name)
            return call(*arguments, **named)

        return first if name.startswith((*TO_THE_REGISTRY, "create_")) else call


def swap_until_killed(config, run, at):
    Killer(config.workspace, at)
    swap.run(config, run)


def first_swap_until_killed(config, run, at):
    Killer(config.workspace, at, of=(*REQUESTS, *TO_THE_REGISTRY))
    swap.run(config, run)


def swap_of_two_until_killed(config, run, at):
    Killer(config.workspace, at, of=KINDS_OF_REQUESTS)
    swap.run(config, run)


def swap_until_killed_while_a_model_loads(config, run, at):
    Killer(config.workspace, at, of=("load_model",), after=WHILE_IT_LOADS)
    swap.run(config, run)


def rollback_until_killed(config, at):
    os.environ["TOXIC_WORKSPACE"] = str(config.workspace)  # the server that forks was started by an earlier test
    Killer(config.workspace, at, of=(*REQUESTS, *TO_THE_REGISTRY))
    rollback.run(overrides(config), "ann", "too strict", "configs", "config")


def undo_until_killed(config, run, at):
    """The new version does not answer as it did in `stage`, and going back is what is interrupted."""
    killer, undo = Killer(config.workspace, at, armed=False), exchange.undo

    def armed_undo(*arguments):
        killer.armed = True
        undo(*arguments)

    exchange.undo = armed_undo
    live_servers.as_expected = lambda *arguments: False
    try:
        swap.run(config, run)
    except StepFailed:
        pass


def killed(target, *arguments) -> bool:
    """Runs it in a process of its own; whether that was killed, and did not end by itself."""
    process = FORKSERVER.Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def finish_or_undo(config):
    with registry.lease(config, "test"), live_servers.connect(config) as servers:
        exchange.finish_or_undo(config, servers)


@pytest.fixture
def config(config):
    return changed(config, keep_previous_loaded=True, tokenizer_instances=1)  # each is a process to start


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
        while not self.stop.wait(0.05):
            try:
                assert answer(self.config)["version"] in VERSIONS
            except Exception as error:
                self.failures.append(error)


def in_service(config) -> int:
    """The version that all servers answer with, that is champion and that a server which starts now would serve."""
    version = registry.alias(config, "champion")
    assert [answer(one)["version"] for one in each(config)] == [version] * len(config.serving.urls)
    assert version == repository.served(repository.live(config))
    assert not exchange.journal_file(config).exists()
    return version


def require_swapped(config, old, new, keeps_old=True):
    loaded = [old, new] if keeps_old and old < new else [new]  # what names no version is answered by the highest
    assert in_service(config) == new and registry.alias(config, "previous") == old
    assert all(ready(one) == loaded for one in each(config))
    assert registry.history(config)[:2] == [new, old]
    assert registry.tags(config, old)["replaced_by"] == str(new)
    assert not {"swap_failed_because", "swap_failed_at"} & registry.tags(config, new).keys()
    live = repository.live(config)
    for part in repository.PARTS:
        written = repository.read(repository.config_file(live, part))
        assert list(written.version_policy.specific.versions) == loaded
        assert [folder.name for folder in (live / part).glob(".*") if folder.is_dir()] == []


def kill_at_every_point(config, bring, target) -> int:
    """After version 2, versions 3, 1, 2 … come into service, each by a swap killed one point later than the last.

    Three in four are finished or undone and left at that; after the fourth the swap itself is run again, which does so
    first. It has to come into service then, whatever the killed ones have left. Returns how many swaps there were.
    """
    old = in_service(config)
    for at in itertools.count(1):
        new = old % 3 + 1
        run = decided(config, bring, new)
        repository.remove(repository.live(config), new)  # it comes as a new version would
        was_killed = killed(target, config, run, at)
        assert {answer(one)["version"] for one in each(config)} <= {old, new}
        if was_killed and at % 4:
            finish_or_undo(config)
        else:
            assert swap.run(config, run)["served_version"] == new
        served = in_service(config)
        assert served == new or (was_killed and at % 4 and served == old)
        if served == new:
            require_swapped(config, old, new)
            old = new
        if not was_killed:
            return at


# A swap asks nine times for a model to be loaded, and three times more where it lets go of one that was kept.
@pytest.mark.parametrize(
    "target, more_than",
    [(swap_until_killed, 10), (undo_until_killed, 10), (swap_until_killed_while_a_model_loads, 9)],
)
def test_a_swap_killed_at_any_point_is_finished_or_undone_by_the_next(config, live, bring, target, more_than):
    put_in_service(config, bring, 1)
    put_in_service(config, bring, 2)
    with Asking(config) as client:
        assert kill_at_every_point(config, bring, target) > more_than
    assert client.failures == []


def test_a_swap_killed_between_two_servers_leaves_both_with_one_version(config_of_both, two, bring):
    put_in_service(config_of_both, bring, 1)
    put_in_service(config_of_both, bring, 2)
    assert kill_at_every_point(config_of_both, bring, swap_of_two_until_killed) >= 10


def test_a_first_swap_killed_at_any_point_leaves_all_or_nothing_in_service(config, live, bring):
    for at in itertools.count(1):
        was_killed = killed(first_swap_until_killed, config, decided(config, bring, 1), at)
        if was_killed and at % 4:
            finish_or_undo(config)
        elif was_killed:
            assert swap.run(config, decided(config, bring, 1))["served_version"] == 1
        if registry.alias(config, "champion"):
            assert in_service(config) == 1 and registry.alias(config, "previous") is None
            start_empty(config, live)
        else:
            assert at % 4 and nothing_in_service(config)
        if not was_killed:
            break
    assert at > 10


def start_empty(config, live) -> None:
    live.kill()
    shutil.rmtree(repository.live(config))
    registry.delete_alias(config, "champion")
    live.start()


def nothing_in_service(config) -> bool:
    with pytest.raises(InferenceServerException, match="is not found|no available versions|is not ready"):
        answer(config)
    served = repository.served(repository.live(config))
    return served is None and ready(config) == [] and not exchange.journal_file(config).exists()


def test_a_rollback_killed_at_any_point_is_done_once(config, live, bring):
    for number in (3, 1, 2):
        put_in_service(config, bring, number)
    for at in itertools.count(1):
        was_killed = killed(rollback_until_killed, config, at)
        assert answer(config)["version"] in (1, 2)
        undone = registry.alias(config, "champion") == 2
        if was_killed and at % 4:
            finish_or_undo(config)
        elif undone or exchange.journal_file(config).exists():  # else all was done
            done = rollback.run(overrides(config), "bo", "too strict", "configs", "config")
            assert (done["served_version"], done["rolled_back_version"]) == (1, 2)
        served = in_service(config)
        assert served == 1 or (was_killed and at % 4)
        if served == 1:
            assert registry.alias(config, "previous") == 3 and ready(config) == [1]
            assert "version 2 was rolled back by" in registry.hold(config)
            assert registry.tags(config, 2)["rolled_back_because"] == "too strict"
        if not was_killed:
            break
        if registry.hold(config):
            registry.clear_hold(config, "cy", "looked at")
        if served == 1:
            put_in_service(config, bring, 2)
        require_swapped(config, 1, 2)
    assert at > 10


def test_a_version_that_comes_again_killed_at_any_point_leaves_what_was_proved_or_serves(config, live, bring):
    """What is built of the version before has to take the place of the files that a rollback would go to."""
    put_in_service(config, bring, 1)
    put_in_service(config, bring, 2)
    proved = identities(config)
    for at in itertools.count(1):
        assert killed(swap_again_until_killed, config, decided(config, bring, 1), at)
        finish_or_undo(config)
        assert not any(exchange.aside(config).glob("*/*"))
        if in_service(config) == 1:
            break
        assert identities(config) == proved and ready(config) == [1, 2]
    assert at > 10


def swap_again_until_killed(config, run, at):
    Killer(config.workspace, at, of=("os.rename", "os.rmdir", *REQUESTS))
    swap.run(config, run)


def identities(config) -> list[int]:
    """Of version 1's folders: others of the same content are others."""
    return [repository.folder(repository.live(config), part, 1).stat().st_ino for part in repository.PARTS]


class TritonKiller:
    """Kills the server before the `at`-th request that changes it, or that the first golden message is sent with.

    Args:
        after: 0, or the seconds by which the kill follows the begin of the `at`-th request to load a model.
    """

    def __init__(self, monkeypatch, live, at: int, after: float):
        self.live, self.at, self.last = live, at, None
        self.timer = threading.Timer(after, live.kill) if after else None
        for name in ("load_model",) if after else (*REQUESTS, "infer"):
            monkeypatch.setattr(InferenceServerClient, name, self.watched(name, getattr(InferenceServerClient, name)))

    def watched(self, name, function):
        def first(client, model, *arguments, **named):
            if (name, model) != self.last or name != "infer":
                self.at -= 1
                if self.at == 0:
                    self.timer.start() if self.timer else self.live.kill()
            self.last = (name, model)
            return function(client, model, *arguments, **named)

        return first


@pytest.mark.parametrize("after", [0, WHILE_IT_LOADS])
def test_a_triton_killed_at_any_point_of_a_swap_serves_what_is_committed(config, live, bring, monkeypatch, after):
    put_in_service(config, bring, 1)
    put_in_service(config, bring, 2)
    old = 2
    for at in itertools.count(1):
        new = old % 3 + 1
        run = decided(config, bring, new)
        with monkeypatch.context() as patched:
            killer = TritonKiller(patched, live, at, after)
            failure = failure_of(swap.run, config, run)
        if killer.at > 0:  # the swap has fewer such points
            assert failure is None
            break
        if killer.timer:
            killer.timer.join()
        committed = repository.served(repository.live(config))
        unfinished = exchange.journal_file(config).exists()  # then it starts with what is committed and nothing else
        said = {old: f"version {new} is not put into service", new: f"version {new} is in service, but not all"}
        assert str(failure).startswith(said[committed]) or (failure is None and after and committed == new)
        live.start("/v2/models/toxic_text/ready")
        assert answer(config)["version"] == committed
        if at % 4:
            finish_or_undo(config)
        else:
            assert swap.run(config, run)["served_version"] == new
        served = in_service(config)
        assert served == (committed if at % 4 else new)
        if served == new:
            require_swapped(config, old, new, keeps_old=not (unfinished and committed == new))
            old = new
    assert at > (9 if after else 10) and in_service(config) == new


def failure_of(function, *arguments):
    try:
        function(*arguments)
    except StepFailed as failure:
        return failure
