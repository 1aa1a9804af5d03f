"""How many decisions on toxic messages a disguise turns, with the cleaning of before and with today's.

    python benchmarks/obfuscation.py [--messages=500] [hydra.override=value …]

Asked about are toxic messages of the test split, half of them Russian. Of those that the trained model calls toxic: the
share that it does not call so any more once their words are in disguise, for each way of `tasks/training/disguises.py`.
Needs a run up to `evaluate`; a larger sample has enough toxic test messages:

    python commands.py download profile=demo data.sample.english_rows=16000 data.sample.russian_rows=8000
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import json_line  # noqa: E402
from tasks import config as configuration  # noqa: E402
from tasks.data import split_key, splits  # noqa: E402
from tasks.labels import LANGUAGES  # noqa: E402
from tasks.text import clean_start  # noqa: E402
from tasks.training import checkpoint, disguises, evaluate  # noqa: E402


def main(messages: int, overrides: list[str]) -> None:
    config = configuration.load(overrides, configuration.SHIPPED)
    folder = checkpoint.require(checkpoint.final(config))
    length = checkpoint.settings(folder)["max_chars"]
    cleanings = {
        "before": lambda text: split_key.clean(text)[:length].rstrip(" "),
        "after": lambda text: clean_start(text, length),
    }
    ask, threshold = evaluate.merged(folder), checkpoint.thresholds(folder)[0]

    def toxic(texts: list[str]) -> np.ndarray:
        return ask(texts)[:, 0] >= threshold

    for language, texts in chosen(splits.read(config.workspace, "test"), messages).items():
        known = [text for text, yes in zip(texts, toxic(texts)) if yes]
        for way in disguises.WAYS:
            hidden = [disguises.disguised(text, way) for text in known]
            turned = {
                name: round(float(1 - toxic([clean(text) for text in hidden]).mean()), 4)
                for name, clean in cleanings.items()
            }
            json_line.of_host(
                f"obfuscation_{language}_{way}",
                turned["after"],
                "share of decisions turned",
                before=turned["before"],
                messages=len(known),
                model=config.model.name,
            )


def chosen(test: pl.DataFrame, number: int) -> dict[str, list[str]]:
    """{language: toxic test messages}, `number` together, by id: the same ones each time."""
    toxic = test.filter(toxic=1).sort("id")
    half = {language: toxic.filter(language=language).head(number // len(LANGUAGES)) for language in LANGUAGES}
    found = {language: frame["text"].to_list() for language, frame in half.items()}
    if (had := sum(map(len, found.values()))) < number:
        sys.exit(f"the test split has {had} of {number} toxic messages to ask for: prepare a larger sample")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=500)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    main(given.messages, given.overrides)
