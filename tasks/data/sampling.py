"""Which messages are kept when there are more than `data.max_samples`, and which split each belongs to."""

import polars as pl

from tasks.config import Data
from tasks.data import messages
from tasks.data.splits import SPLITS
from tasks.labels import TYPES

STRATUM = ("language", "toxic", "rarest")


def sampled(rows: pl.DataFrame, data: Data) -> pl.Series:
    """Which rows are kept (bool), at most `max_samples`: from each stratum those whose second hash is lowest, so that
    most stay from week to week.

    Languages keep their own proportions, but for `min_language_share`. English toxic messages are kept first, up to
    `toxic_share`; within toxic and not, every stratum of a rare type keeps its share, rounded up, and the commonest one
    makes room for it.
    """
    if rows.height <= data.max_samples:
        return pl.repeat(True, rows.height, eager=True)
    keyed = rows.select(
        "language", "toxic", rarest=rarest_type(rows), place=messages.place(pl.col("hash"), data.split.salt, "keep")
    )
    limits = quotas(keyed.group_by(STRATUM).agg(pl.len().alias("rows")), data)
    rank = pl.col("place").rank("ordinal").over(STRATUM)
    ranked = keyed.select(*STRATUM, rank=rank).join(limits, on=STRATUM, maintain_order="left")
    return ranked["rank"] <= ranked["quota"]


def rarest_type(rows: pl.DataFrame) -> pl.Expr:
    """Of the types that each row has, the one that the fewest rows have; "none" where it has none, or none is known."""
    by_rarity = sorted(TYPES, key=lambda name: rows[name].sum())
    named = [pl.when(pl.col(name) == 1).then(pl.lit(name)) for name in by_rarity]
    return pl.coalesce(*named, pl.lit("none"))


def quotas(counts: pl.DataFrame, data: Data) -> pl.DataFrame:
    """[language, toxic, rarest, quota] for the strata of `counts`: [language, toxic, rarest, rows]."""
    found, budgets = [], language_budgets(dict(counts.group_by("language").agg(pl.sum("rows")).rows()), data)
    for (language,), group in counts.group_by("language"):
        budget = budgets[language]
        toxic, others = (group.filter(toxic=label) for label in (1, 0))
        natural = toxic["rows"].sum() / group["rows"].sum()
        share = max(natural, data.toxic_share or 0) if language == "en" else natural
        number = min(round(budget * share), toxic["rows"].sum())
        for part, room in ((toxic, number), (others, budget - number)):
            every, left = part["rows"].sum(), room
            for label, rarest, rows in part.sort("rows", "rarest").select("toxic", "rarest", "rows").rows():
                quota = min(-(-room * rows // every), left)  # rounded up
                left -= quota
                found.append((language, label, rarest, quota))
    schema = {name: counts.schema[name] for name in STRATUM} | {"quota": pl.Int64}
    return pl.DataFrame(found, schema, orient="row")


def language_budgets(rows: dict[str, int], data: Data) -> dict[str, int]:
    """{language: how many of its messages are kept} for {language: messages}, `max_samples` together.

    The smallest comes first: it gets its proportion, or `min_language_share` of `max_samples` where that is more, but
    not more than it has; the others share what is left in the same way.
    """
    budgets, left, total = {}, data.max_samples, sum(rows.values())
    for language, number in sorted(rows.items(), key=lambda item: (item[1], item[0])):
        floor = min(int(data.max_samples * data.min_language_share), number)
        budgets[language] = max(left * number // total, floor)
        left, total = left - budgets[language], total - number
    return budgets


def split(rows: pl.DataFrame, data: Data) -> dict[str, pl.DataFrame]:
    """Train, val and test. A message's split is a hash of its normalised text: whatever comes beside it next week, it
    stays where it was, so that no later model is tested on what an earlier one has learned from.
    """
    place = messages.place(pl.col("hash"), data.split.salt, "split")
    train, val = data.split.train, data.split.train + data.split.val
    name = pl.when(place < train).then(pl.lit("train")).when(place < val).then(pl.lit("val")).otherwise(pl.lit("test"))
    named = rows.with_columns(split=name)
    return {name: named.filter(split=name).drop("split") for name in SPLITS}
