import pytest

from tasks import config as configuration
from tasks.data import schemas
from tasks.errors import StepFailed


@pytest.mark.parametrize(
    "content, message",
    [
        ("comment,label\na,1.0\n", "has no column toxic"),
        ("comment,toxic\na,1.0\nb,yes\n", "row 2: toxic is 'yes', neither 0 nor 1"),
        ("comment,toxic\na,0.5\n", "row 1: toxic is '0.5'"),
        ("comment,toxic\na,\n", "row 1: toxic is None"),
    ],
)
def test_a_file_that_is_not_in_its_schema_is_named(tmp_path, content, message):
    config = configuration.load(["profile=demo", f"workspace={tmp_path}"])
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / "labeled.csv").write_text(content)
    with pytest.raises(StepFailed, match=message):
        schemas.read(config.data.sources[1], config)
