"""The data card: what a prepared version of the data holds, what was left out and why, with examples.

It travels inside data/processed, so it says nothing about when or by which run it was made: the same data has the same
card, and the same version.
"""

from pathlib import Path

import polars as pl

from tasks import files, page
from tasks.config import Config
from tasks.errors import UsageError
from tasks.labels import TYPES
from tasks.run import Run
from tasks.text import clean

TEMPLATE = Path(__file__).with_name("card.html.j2")
EXAMPLES = 5  # shown for each reason
SHOWN_CHARS = 240

REASONS = {
    "empty": "Nothing is left of the text once it is cleaned.",
    "conflicting": "Copies of one message contradict each other in toxic and no moderator has decided: all go.",
    "overruled": "A moderator's newer decision says otherwise.",
    "duplicate": "The same message again, but for case and punctuation; what copies know of types was merged.",
    "over_max_samples": "More than data.max_samples messages: these have the higher hashes of their stratum "
    "(language, toxic, rarest type).",
    "disguised": "A copy of another message, as cleaning shows: hidden characters, or letters that pose as others. "
    "Copies that contradict each other all go.",
    "near_duplicate": "A training message that is nearly one of validation or test: a model that has learned it has "
    "seen the answer.",
}


def build(config: Config, found: dict, splits: dict[str, pl.DataFrame], gone: dict, unique: pl.DataFrame) -> dict:
    """The card as plain values.

    {"sources": [{"file", "languages", "rows", "kept"}], "messages": n different ones before sampling,
    "splits": {split: {language: {"rows": n, label: n}}},
    "types_known": {split: {language: n rows whose types are known}},
    "lengths": {split: {"median", "p95", "max"}} in characters,
    "natural_toxic_share": {language: share}, "settings": {key below `data`: value},
    "dropped": [{"reason", "why", "rows", "examples": [{"id", "text", "toxic", "hidden", "note"}]}]},
    where what is hidden is toxic by its own label, by that of a copy, or of the message it nearly is.

    Args:
        found: the step's result; see `prepare.run`.
        gone: the rows that were dropped, by reason.
        unique: one row per message, before sampling.
    """
    data = config.data
    return {
        "sources": sources(config, splits, gone),
        "messages": unique.height,
        "splits": found["labels"],
        "types_known": {name: types_known(frame) for name, frame in splits.items()},
        "lengths": {name: lengths(frame) for name, frame in splits.items()},
        "natural_toxic_share": found["natural_toxic_share"],
        "settings": {
            "max_samples": data.max_samples,
            "min_language_share": data.min_language_share,
            "toxic_share": data.toxic_share,
            "max_chars": data.max_chars,
            "near_duplicate": data.near_duplicate,
            **{f"split.{key}": value for key, value in data.split.model_dump().items()},
        },
        "dropped": [
            {
                "reason": reason,
                "why": why,
                "rows": gone[reason].height,
                "examples": examples(reason, gone[reason], unique),
            }
            for reason, why in REASONS.items()
        ],
    }


def write(card: dict, folder: Path) -> Path:
    """Writes card.json and card.html, which works offline, into `folder`; returns the page."""
    filters = {"number": "{:,}".format, "percent": lambda share: f"{100 * share:.1f}\u00a0%"}
    files.write_json(folder / "card.json", card)
    files.write_text(folder / "card.html", page.render(TEMPLATE, filters, card=card, types=TYPES))
    return folder / "card.html"


def read(run: Run) -> dict:
    """The card of a run, as `build` made it.

    Raises:
        UsageError: nothing has been prepared in this run.
    """
    file = run.folder / "card.json"
    if not file.is_file():
        raise UsageError(f"{file} does not exist: run `python commands.py prepare` first")
    return files.read_json(file)


def sources(config: Config, splits: dict[str, pl.DataFrame], gone: dict) -> list[dict]:
    """Of each source: its languages, its rows, and how many of them are messages of a split."""
    kept = pl.concat([frame.select("source", "language") for frame in splits.values()])
    every = pl.concat([kept, *(frame.select("source", "language") for frame in gone.values())])
    rows, used = (dict(frame["source"].value_counts().rows()) for frame in (every, kept))
    languages = dict(every.group_by("source").agg(pl.col("language").unique().sort()).rows())
    return [
        {
            "file": source.file,
            "languages": languages.get(source.file, []),
            "rows": rows.get(source.file, 0),
            "kept": used.get(source.file, 0),
        }
        for source in config.data.sources
    ]


def types_known(frame: pl.DataFrame) -> dict[str, int]:
    return dict(frame.group_by("language").agg(pl.col(TYPES[0]).count()).sort("language").rows())


def lengths(frame: pl.DataFrame) -> dict[str, int]:
    chars = frame["text"].str.len_chars()
    return {"median": int(chars.median() or 0), "p95": int(chars.quantile(0.95) or 0), "max": int(chars.max() or 0)}


def examples(reason: str, rows: pl.DataFrame, unique: pl.DataFrame) -> list[dict]:
    """A few of the rows, those of the lowest hashes, which are no others next week; an id is file:row."""
    if reason == "empty":
        return [example(reason, row, None) for row in rows.head(EXAMPLES).iter_rows(named=True)]
    lowest = rows.select(pl.col("hash").unique().bottom_k(EXAMPLES)).to_series()
    shown = rows.filter(pl.col("hash").is_in(lowest.implode())).sort("hash", "source", "row").head(2 * EXAMPLES)
    counterpart = "other" if reason == "near_duplicate" else "hash"  # the message that stands for it, where one does
    stays = unique.filter(pl.col("hash").is_in(shown[counterpart].implode()))
    kept = {row["hash"]: row for row in stays.iter_rows(named=True)}
    return [example(reason, row, kept.get(row[counterpart])) for row in shown.iter_rows(named=True)]


def example(reason: str, row: dict, kept: dict | None) -> dict:
    return {
        "id": f"{row['source']}:{row['row']}",
        "text": cut(clean(row["text"])),
        "toxic": row["toxic"],
        "hidden": reason == "conflicting" or bool(row["toxic"] or kept and kept["toxic"]),
        "note": note(reason, row, kept),
    }


def note(reason: str, row: dict, kept: dict | None) -> str:
    if reason == "empty":
        return f"was {row['text'][:40]!r}"
    if reason == "duplicate":
        return f"as {kept['source']}:{kept['row']}"
    if reason == "overruled":
        return f"decided on {kept['decided_at']:%Y-%m-%d} in {kept['source']}:{kept['row']}"
    if reason == "near_duplicate":
        return f"{row['similarity']:.2f} like {row['other']:016x} in {row['split']}: {cut(row['other_text'])}"
    return ""


def cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
