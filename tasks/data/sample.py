"""A generated sample in Kaggle's own files and columns, for machines without an account or a network.

Messages grow from a small grammar: a topic, neutral sentences around it and, in the toxic ones, fragments that carry
the types. Decoys use the same words harmlessly, so that words alone do not tell. The vocabulary is mild or masked.
The same seed gives the same rows, and more rows begin with the same ones.
"""

import csv
import re
from itertools import islice
from pathlib import Path
from random import Random

from tasks.data import sample_en, sample_ru
from tasks.labels import LABELS, TYPES

JIGSAW_FILE = "jigsaw-toxic-comment-train.csv"
RUSSIAN_FILE = "labeled.csv"

# Above Jigsaw's natural 9.6 % so that every type has enough examples in a few thousand rows.
TOXIC_SHARE = {"en": 0.27, "ru": 0.335}
DECOY_SHARE = 0.12  # of the messages, toxic ones too: a decoy beside an insult must not hide it

# What a toxic message is made of, how often, and which types that gives it: a fragment may bring several, as in Jigsaw,
# where severe_toxic hardly occurs without obscene and insult, and some toxic messages have no type at all.
FRAGMENTS = {
    "rude": (14, ()),
    "insult": (26, ("insult",)),
    "obscene": (22, ("obscene",)),
    "abuse": (18, ("obscene", "insult")),
    "severe": (10, ("severe_toxic", "obscene", "insult")),
    "threat": (13, ("threat",)),
    "hate": (14, ("identity_hate", "insult")),
}
SECOND_FRAGMENT_SHARE = 0.2

# What decoys quote: any toxic sentence.
QUOTED = {
    grammar.LANGUAGE: [sentence.rstrip(".") for kind in FRAGMENTS for sentence in grammar.SENTENCES[kind]]
    for grammar in (sample_en, sample_ru)
}

# Defects of the real files, as shares of the rows.
DUPLICATE, CONFLICT, EMPTY, LONG = 0.012, 0.006, 0.003, 0.004

LEET = str.maketrans("aeiosаеио", "@310$@3и0")
EMOJI = "😀 😂 👍 🙏 🔥 🤔 😡 🚲 🎸 ⚽ ❤️ 🤡".split()


def write(folder: Path, english_rows: int, russian_rows: int, label_noise: float, seed: int) -> None:
    """Writes both files into `folder`.

    Args:
        label_noise: share of the rows whose label `toxic`, or one of whose types, is wrong.
    """
    with (folder / JIGSAW_FILE).open("w", encoding="utf-8", newline="") as stream:
        rng = Random(f"{seed}-en-ids")
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["id", "comment_text", *LABELS])
        for text, labels in islice(rows(sample_en, label_noise, seed), english_rows):
            table.writerow([f"{rng.getrandbits(64):016x}", text, *(int(name in labels) for name in LABELS)])
    with (folder / RUSSIAN_FILE).open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["comment", "toxic"])
        for text, labels in islice(rows(sample_ru, label_noise, seed), russian_rows):
            table.writerow([f"{text}\n", float("toxic" in labels)])


def rows(grammar, label_noise: float, seed: int):
    """Yields (text, set of label names) without end, defects included."""
    rng = Random(f"{seed}-{grammar.LANGUAGE}")
    earlier = []
    while True:
        draw = rng.random()
        if draw < DUPLICATE and earlier:
            yield rng.choice(earlier)
        elif draw < DUPLICATE + CONFLICT and earlier:
            text, labels = rng.choice(earlier)
            yield text, set() if labels else {"toxic"}
        elif draw < DUPLICATE + CONFLICT + EMPTY:
            yield rng.choice(["", " ", "\n", " \r\n\t "]), set()
        else:
            text, labels = message(grammar, rng)
            if rng.random() < LONG:
                text = flood(text, rng)
            earlier.append((text, mislabelled(labels, rng) if rng.random() < label_noise else labels))
            yield earlier[-1]


def message(grammar, rng: Random) -> tuple[str, set]:
    """One message about one topic, and its true labels."""
    slots = grammar.SLOTS | rng.choice(grammar.TOPICS) | {"quoted": QUOTED[grammar.LANGUAGE]}
    labels = set()
    if rng.random() < TOXIC_SHARE[grammar.LANGUAGE]:
        number = 2 if rng.random() < SECOND_FRAGMENT_SHARE else 1
        kinds = rng.choices(list(FRAGMENTS), [weight for weight, _ in FRAGMENTS.values()], k=number)
        sentences = [grammar.SENTENCES[kind] for kind in kinds]
        labels = {"toxic"}.union(*(FRAGMENTS[kind][1] for kind in kinds))
    else:
        sentences = []
    if rng.random() < DECOY_SHARE:
        sentences.append(grammar.SENTENCES["decoy"])
    around = rng.choices([0, 1, 2, 3], [4, 5, 3, 1])[0]
    sentences += [grammar.SENTENCES["neutral"]] * (around or not sentences)
    rng.shuffle(sentences)
    text = " ".join(fill(rng.choice(templates), slots, rng) for templates in sentences)
    return styled(text, bool(labels), rng), labels


def fill(template: str, slots: dict, rng: Random) -> str:
    """Replaces every `{slot}` by one of its words; those may have slots in turn."""
    while "{" in template:
        template = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(slots[slot[1]]), template)
    text = re.sub(r"\ba (?=[aeiou])", "an ", template)
    return text[0].upper() + text[1:]


def styled(text: str, toxic: bool, rng: Random) -> str:
    """How people write: no capitals, all capitals, typos, streeetched and l33t words, markup, emoji, line breaks."""
    if rng.random() < 0.3:
        text = text.lower().rstrip(".")
    elif rng.random() < (0.12 if toxic else 0.03):
        text = text.upper()
    for share, change in ((0.10, swapped), (0.05, stretched), (0.05, leet)):
        if rng.random() < share:
            text = change(text, rng)
    if rng.random() < 0.06:
        text += " " + rng.choice(EMOJI) * rng.randint(1, 3)
    if rng.random() < 0.05:
        text = rng.choice(["&quot;{}&quot;", "{}<br>", "<b>{}</b>", "{} &amp; so on", "== {} =="]).replace("{}", text)
    if rng.random() < 0.06:
        text = text.replace(". ", rng.choice([".\n", ".\r\n", ".\n\n", ".<br>"]))
    return text


def change_a_word(text: str, rng: Random, change) -> str:
    words = text.split(" ")
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if long:
        chosen = rng.choice(long)
        words[chosen] = change(words[chosen])
    return " ".join(words)


def swapped(text: str, rng: Random) -> str:
    return change_a_word(text, rng, lambda word: word[:2] + word[3] + word[2] + word[4:])


def stretched(text: str, rng: Random) -> str:
    return change_a_word(text, rng, lambda word: word[:-2] + word[-2] * rng.randint(2, 5) + word[-1])


def leet(text: str, rng: Random) -> str:
    return change_a_word(text, rng, lambda word: word.translate(LEET))


def flood(text: str, rng: Random) -> str:
    """The same message pasted over and over: thousands of characters."""
    return rng.choice([" ", "\n", " !!! "]).join([text] * (rng.randint(3000, 9000) // len(text)))


def mislabelled(labels: set, rng: Random) -> set:
    """An annotator's slip: `toxic` flipped, or one type forgotten or seen where it isn't."""
    if not labels:
        return {"toxic"}
    if rng.random() < 0.5:
        return set()
    return labels ^ {rng.choice(TYPES)}
