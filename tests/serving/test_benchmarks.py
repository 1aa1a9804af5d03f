"""What the benchmarks of serving and of swaps measure is still made as a run makes it."""

from benchmarks import tiny_versions


def test_a_version_of_the_benchmarks_is_exported_built_and_staged(tmp_path):
    config = tiny_versions.configure(tmp_path)
    tiny_versions.prepare(config)
    staged = tiny_versions.staged(config, 1).result("stage")
    assert staged["version"] == 1 and staged["parity"]["different"] == 0
