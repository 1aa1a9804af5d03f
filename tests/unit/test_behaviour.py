import re

import numpy as np
import pytest
import yaml

from tasks.errors import UsageError
from tasks.text import clean
from tasks.training import behaviour, disguises

INSULTS = ("idiot", "moron", "дурак", "идиот")


def checks(tmp_path, **values):
    """A file of checks and its cases."""
    file = tmp_path / "behaviour.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return behaviour.read(file)


def entry(text, **more):
    return {"capability": "greetings", "language": "en", "text": text, **more}


def good(texts):
    return np.array([0.9 if any(word in text.lower() for word in INSULTS) else 0.1 for text in texts])


def test_a_template_gives_a_case_for_every_way_to_fill_its_slots(tmp_path):
    words = {"en": {"greeting": ["hello", "welcome"]}}
    own = entry("{greeting}, {name}!", toxic=False, words={"name": ["Anna", "Kenji"]})
    cases = checks(tmp_path, words=words, minimum=[own])
    texts = {case.texts for case in cases}
    assert texts == {("Hello, Anna!",), ("Hello, Kenji!",), ("Welcome, Anna!",), ("Welcome, Kenji!",)}


def test_of_many_ways_the_same_few_are_drawn_each_time(tmp_path):
    many = {letter: [f"{letter}{k}" for k in range(10)] for letter in "ab"}
    cases = checks(tmp_path, minimum=[entry("{a} {b}", toxic=False, words=many)])
    assert len(cases) == len(set(cases)) == behaviour.MOST
    assert cases == checks(tmp_path, minimum=[entry("{a} {b}", toxic=False, words=many)])


def test_the_words_of_a_varied_slot_are_compared_with_each_other(tmp_path):
    words = {"name": ["Anna", "Kenji"], "thanks": ["thanks", "thank you"]}
    cases = checks(tmp_path, invariance=[entry("{thanks}, {name}.", vary=["name"], words=words)])
    assert [case.texts for case in cases] == [
        ("Thanks, Anna.", "Thanks, Kenji."),
        ("Thank you, Anna.", "Thank you, Kenji."),
    ]


def test_a_text_is_changed_as_people_would(tmp_path):
    changes = ["lower", "upper", "typo", "emoji", "no_punctuation"]
    (case,) = checks(tmp_path, invariance=[entry("You are an Idiot, Anna!", change=changes)])
    assert case.texts[1:] == (
        "you are an idiot, anna!",
        "YOU ARE AN IDIOT, ANNA!",
        "You are an Iidot, Anna!",
        "You are an Idiot, Anna! 🙂",
        "You are an Idiot Anna",
    )


def test_words_are_disguised_as_people_do_and_cleaning_sees_through_what_hides():
    ways = list(disguises.WAYS)
    for text, leet, spaced in (
        ("You are a clown.", "You are a cl0wn.", "You are a c l o w n."),
        ("Ты дурак, Анна", "Ты дур@к, @нн@", "Ты д у р а к, А н н а"),
    ):
        hidden = [disguises.disguised(text, way) for way in ways]
        assert len({text, *hidden}) == 7
        assert [clean(one) for one in hidden] == [text] * 4 + [leet, spaced]


def test_disguise_is_checked_against_the_plain_message(tmp_path):
    cases = checks(tmp_path, obfuscation=[entry("You are an idiot.", change=["zero_width", "spaced"])])
    found = behaviour.check(cases, good, 0.5)
    assert found["kinds"] == {"obfuscation": 0.0}  # zero width is cleaned away, spaces are not
    assert [score for _, score in found["failed"][0]["scores"]] == [0.9, 0.9, 0.1]
    cases = checks(tmp_path, obfuscation=[entry("You are an idiot.", change=["zero_width"])])
    assert behaviour.check(cases, good, 0.5)["pass_rate"] == 1.0


def test_a_vowel_gets_its_article(tmp_path):
    (case,) = checks(tmp_path, minimum=[entry("You are a {insult}.", toxic=True, words={"insult": ["idiot"]})])
    assert case.texts == ("You are an idiot.",)


def test_checks_tell_a_good_from_a_bad_model(tmp_path):
    cases = checks(
        tmp_path,
        minimum=[entry("You are an idiot.", toxic=True), entry("Hello!", toxic=False)],
        invariance=[entry("You moron.", change=["lower", "upper"])],
        direction=[entry("Where is it?", worse="Where is it, idiot?")],
    )
    assert behaviour.check(cases, good, 0.5)["pass_rate"] == 1.0
    bad = behaviour.check(cases, lambda texts: 1 - good(texts), 0.5)
    assert bad["kinds"] == {"minimum": 0.0, "invariance": 1.0, "direction": 0.0}
    assert bad["pass_rate"] == 0.25
    deaf_to_capitals = behaviour.check(cases, lambda texts: good(texts) * [not t.isupper() for t in texts], 0.5)
    (failed,) = deaf_to_capitals["failed"]
    assert failed["kind"] == "invariance"
    assert failed["scores"] == [["You moron.", 0.9], ["you moron.", 0.9], ["YOU MORON.", 0.0]]


def test_pass_rates_stand_by_capability_and_language(tmp_path):
    russian = {"capability": "greetings", "language": "ru", "text": "Привет, {name}!", "toxic": True}
    russian["words"] = {"name": ["Анна", "Тимур", "дурак"]}
    found = behaviour.check(checks(tmp_path, minimum=[entry("Hello!", toxic=False), russian]), good, 0.5)
    assert [(row["language"], row["cases"], row["pass_rate"]) for row in found["capabilities"]] == [
        ("en", 1, 1.0),
        ("ru", 3, pytest.approx(1 / 3)),
    ]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"minimum": [entry("Hi!")]}, r"minimum\[0\] \('Hi!'\): toxic is missing, add it"),
        ({"minimum": [entry("Hi!", toxic=False), {"text": "Hm", "toxic": True}]}, r"minimum\[1\] .*capability is miss"),
        ({"minimum": [entry("Hi!", toxic=False, mood="good")]}, r"minimum\[0\] .*mood is no key that is known"),
        ({"minimum": [entry("Hi!", toxic="perhaps")]}, r"minimum\[0\] .*toxic='perhaps': Input should be a valid bool"),
        ({"minimum": ["Hi!"]}, r"minimum.0: 'Hi!': Input should be a valid dict"),
        ({"minima": []}, "minima is no key that is known"),
        (
            {"invariance": [entry("Hi!", change=["louder"])]},
            r"invariance\[0\] .*change.0='louder': Input should be 'low",
        ),
        ({"invariance": [entry("Hi!")]}, r"invariance\[0\] .*give at least one of change, vary, variants"),
        ({"invariance": [entry("Hi!", vary=["name"])]}, r"vary names 'name', but the text has no \{name\}"),
        ({"obfuscation": [entry("Hi!", change=[])]}, r"obfuscation\[0\] .*change=\[\]: List should have at least 1"),
        ({"direction": [entry("Hi {you}!", worse="Hi!")]}, r"direction\[0\] .*\{you\} has no words: add `you: \[…\]`"),
        ({}, "has no check: add an entry under one of minimum, invariance, direction"),
    ],
)
def test_a_wrong_entry_is_named_with_file_key_and_way_out(tmp_path, values, words):
    with pytest.raises(UsageError, match=rf"behaviour.yaml.*{words}"):
        checks(tmp_path, **values)


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    (tmp_path / "behaviour.yaml").write_text("minimum: [")
    with pytest.raises(UsageError, match="behaviour.yaml: .*line 1"):
        behaviour.read(tmp_path / "behaviour.yaml")


def test_the_example_of_the_readme_can_be_added_as_printed(tmp_path):
    readme = (behaviour.CHECKS.parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(minimum:.*?)```", readme, re.DOTALL)
    words = yaml.safe_load(behaviour.CHECKS.read_text(encoding="utf-8"))["words"]
    cases = checks(tmp_path, words=words, **yaml.safe_load(example))
    assert {case.kind for case in cases} == set(behaviour.KINDS)


def test_the_checks_of_the_project_cover_both_languages_alike():
    cases = behaviour.read()
    capabilities = {
        language: {(case.kind, case.capability) for case in cases if case.language == language}
        for language in ("en", "ru")
    }
    assert capabilities["en"] == capabilities["ru"]
    assert {"identity words", "quoted insults", "greetings"} <= {
        c for kind, c in capabilities["en"] if kind == "minimum"
    }
    assert {"case", "typos", "emoji", "names"} <= {c for kind, c in capabilities["en"] if kind == "invariance"}
    assert ("direction", "an insult added") in capabilities["en"]
    assert {"hidden characters", "look-alike letters", "leetspeak", "spaced letters"} <= {
        c for kind, c in capabilities["en"] if kind == "obfuscation"
    }
