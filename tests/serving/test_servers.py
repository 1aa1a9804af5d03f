"""Several live servers on one live repository, and what they keep loaded."""

import time

import pytest
from serving_parts import changed, overrides, put_in_service, ready

from tasks import config as configuration
from tasks.errors import StepFailed, UsageError
from tasks.promotion import registry
from tasks.serving import client, exchange, live_servers, repository, rollback


def versions(pair) -> list[int]:
    """The version that each server answers with."""
    return [client.classify(["you are an idiot"], one.serving.url)[0]["version"] for one in pair]


def test_a_swap_and_a_rollback_reach_all_servers_or_none(pair, two, config_of_both, bring, monkeypatch):
    put_in_service(config_of_both, bring, 1)
    assert versions(pair) == [1, 1]
    put_in_service(config_of_both, bring, 2)
    assert versions(pair) == [2, 2] and [ready(one) for one in pair] == [[1, 2], [1, 2]]

    # The second server fails in every part of the work: the first one has loaded, answered or switched by then. In the
    # first round both have let go of version 1 before.
    for call, model in ((4, repository.CLASSIFIER), (2, repository.TRIAL), (2, repository.TEXT)):
        with monkeypatch.context() as patched, pytest.raises(StepFailed, match="2 serves as before: no room for it"):
            patched.setattr(live_servers, "load", failing(live_servers.load, model, call))
            put_in_service(config_of_both, bring, 3)
        assert versions(pair) == [2, 2] and [ready(one) for one in pair] == [[2], [2]]
        assert registry.alias(config_of_both, "champion") == 2
        assert "no room for it" in registry.tags(config_of_both, 3)["swap_failed_because"]
    put_in_service(config_of_both, bring, 3)
    assert versions(pair) == [3, 3] and "swap_failed_because" not in registry.tags(config_of_both, 3)

    assert rollback.run(overrides(config_of_both), "ann", "too strict", "configs", "config")["served_version"] == 2
    assert versions(pair) == [2, 2] and [ready(one) for one in pair] == [[2], [2]]


def failing(load, model, at):
    """`load`, whose `at`-th call for a model fails."""
    calls = []

    def load_or_fail(config, server, wanted):
        calls.extend([wanted.name] if wanted.name == model else [])
        if wanted.name == model and len(calls) == at:
            raise RuntimeError("no room for it")
        load(config, server, wanted)

    return load_or_fail


def test_a_server_that_is_away_stops_a_swap_before_anything_changes(pair, two, config_of_both, bring):
    put_in_service(config_of_both, bring, 1)
    live = repository.live(config_of_both)
    before = {file: file.read_bytes() for file in live.rglob("*") if file.is_file()}
    two[1].kill()
    with pytest.raises(StepFailed, match=f"the live Triton at {pair[1].serving.url} does not answer.*serving.urls"):
        put_in_service(config_of_both, bring, 2)
    assert {file: file.read_bytes() for file in live.rglob("*") if file.is_file()} == before
    assert versions(pair[:1]) == [1] and registry.alias(config_of_both, "champion") == 1
    # A person takes it out; when it comes back it serves what the others do.
    put_in_service(changed(config_of_both, urls=[pair[0].serving.url]), bring, 2)
    two[1].start("/v2/models/toxic_text/ready")
    assert versions(pair) == [2, 2]


def test_a_server_that_dies_in_a_swap_takes_none_of_the_others_with_it(pair, two, config_of_both, bring, monkeypatch):
    put_in_service(config_of_both, bring, 1)

    def dies(config, server, version):
        try_out(config, server, version)
        two[1].kill()

    try_out = exchange.try_out
    with monkeypatch.context() as patched, pytest.raises(StepFailed, match="1 serves as before"):
        patched.setattr(exchange, "try_out", dies)
        put_in_service(config_of_both, bring, 2)
    assert versions(pair[:1]) == [1] and ready(pair[0]) == [1]
    two[1].start("/v2/models/toxic_text/ready")
    assert versions(pair) == [1, 1]
    put_in_service(config_of_both, bring, 2)
    assert versions(pair) == [2, 2] and not exchange.journal_file(config_of_both).exists()


def test_the_addresses_come_as_a_list_or_with_commas_from_the_environment(monkeypatch):
    monkeypatch.setenv("TRITON_URL", "a:8001, b:8001")
    assert configuration.load(["profile=demo"]).serving.urls == ["a:8001", "b:8001"]
    assert configuration.load(["profile=demo", "serving.urls=[c:1,d:2]"]).serving.urls == ["c:1", "d:2"]
    for wrong in ("http://a:8001", "a", "", "a:8001,,b:8001"):
        monkeypatch.setenv("TRITON_URL", wrong)
        with pytest.raises(UsageError, match="serving.urls"):
            configuration.load(["profile=demo"])


def test_the_version_before_stays_loaded_where_memory_allows_and_a_rollback_loads_nothing(config, live, bring):
    automatic = changed(config, keep_previous_loaded="auto")
    put_in_service(automatic, bring, 1)
    put_in_service(automatic, bring, 2)
    assert ready(config) == [1, 2]
    live.kill()
    live.start("/v2/models/toxic_text/ready")
    assert ready(config) == [1, 2] and versions([config]) == [2]

    stubs = live_models(live)
    undone = rollback.run(overrides(automatic), "ann", "too strict", "configs", "config")
    assert undone["served_version"] == 1 and versions([config]) == [1] and ready(config) == [1]
    assert live_models(live) <= stubs
    while live_models(live) == stubs:  # those of the version that was let go of end in their own time
        time.sleep(0.1)
    # With more to be left free than there is, what served goes at once.
    put_in_service(changed(automatic, memory_headroom_gib=10**6), bring, 3)
    assert ready(config) == [3]


def test_what_names_no_version_of_a_part_is_answered_by_the_one_in_service(config, live, bring):
    """The server takes the highest that it has loaded; so a higher one is not kept beside it."""
    both = changed(config, keep_previous_loaded=True)
    for version, loaded in ((1, [1]), (3, [1, 3]), (2, [2]), (3, [2, 3])):
        put_in_service(both, bring, version)
        assert ready(config) == loaded and versions([config]) == [version] == [bare_version(live)]


def bare_version(live) -> int:
    """The version that answers where a client asks the classifier for token ids, and names none."""
    ids = {"datatype": "INT64", "shape": [1, 2], "data": [[5, 6]]}
    inputs = [{"name": name, **ids} for name in ("input_ids", "attention_mask")]
    response = live.http("POST", f"/v2/models/{repository.CLASSIFIER}/infer", json={"inputs": inputs})
    outputs = {output["name"]: output["data"] for output in response.raise_for_status().json()["outputs"]}
    return outputs["model_version"][0]


def test_a_fault_in_the_version_before_does_not_keep_the_one_in_service_from_starting(config, live, bring):
    both = changed(config, keep_previous_loaded=True)
    put_in_service(both, bring, 1)
    put_in_service(both, bring, 2)
    assert ready(config) == [1, 2]
    live.kill()
    tokenizer = repository.folder(repository.live(config), repository.TOKENIZER, 1) / "tokenizer.json"
    content = tokenizer.read_text()
    tokenizer.unlink()  # it is a link to the engine's
    tokenizer.write_text(content + " ")
    live.start("/v2/models/toxic_text/ready")
    assert ready(config) == [2] and versions([config]) == [2]


def live_models(live) -> set[int]:
    """The processes that the server has started for its models."""
    import psutil

    return {child.pid for child in psutil.Process(live.process.pid).children(recursive=True)}
