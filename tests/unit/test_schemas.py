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


RATED = """id,comment_text,toxic,identity_attack,severe_toxicity
1,a,0.6,0.5,0.0
2,b,0.49999,,0.9
"""
MESSAGES = (
    "data.sources=[{kind: folder, name: x, file: rated.csv, schema: messages, language: en, threshold: %s, "
    "columns: {text: comment_text, toxic: toxic, identity_hate: identity_attack, severe_toxic: severe_toxicity}}]"
)


def rated(tmp_path, content, threshold):
    config = configuration.load(["profile=demo", f"workspace={tmp_path}", MESSAGES % threshold])
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "rated.csv").write_text(content)
    return schemas.read(config.data.sources[0], config)


def test_any_other_set_is_read_by_a_mapping_of_its_columns_and_a_threshold(tmp_path):
    rows = rated(tmp_path, RATED, 0.5)
    assert rows["text"].to_list() == ["a", "b"]
    assert rows.select("toxic", "identity_hate", "severe_toxic", "insult").rows() == [
        (1, 1, 0, None),
        (0, None, 1, None),
    ]


def test_a_cell_of_spaces_is_an_unknown_type_and_a_share_may_have_a_comma(tmp_path):
    content = 'id,comment_text,toxic,identity_attack,severe_toxicity\n1,a,"0,6", ,0.0 \n'
    rows = rated(tmp_path, content, 0.5)
    assert rows.select("toxic", "identity_hate", "severe_toxic").row(0) == (1, None, 0)


@pytest.mark.parametrize(
    "content, threshold, message",
    [
        (RATED, "null", "row 1: toxic is '0.6', neither 0 nor 1; .* may set `threshold`"),
        (RATED.replace("0.6", "1.6"), 0.5, "row 1: toxic is '1.6', no share between 0 and 1"),
        (RATED.replace("0.6", ""), 0.5, "row 1: toxic is None, no share between 0 and 1"),
        (
            RATED.replace("identity_attack", "attack"),
            0.5,
            "rated.csv has no column identity_attack, .* it has id, comment",
        ),
    ],
)
def test_what_does_not_fit_the_mapping_is_named(tmp_path, content, threshold, message):
    with pytest.raises(StepFailed, match=message):
        rated(tmp_path, content, threshold)
