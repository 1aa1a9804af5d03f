"""Copies of a message: the same one again, with the same label or another, and nearly the same one in another split."""

import polars as pl

from tasks.data import messages
from tasks.labels import TYPES

# 32 bands of 4 rows: two messages whose sets of words are 0.7 alike meet in one of them with a chance of 99.98 %.
_PERMUTATIONS, _BANDS = 128, 32


def merged(rows: pl.DataFrame, by: str = "hash") -> tuple[pl.DataFrame, dict[str, pl.DataFrame]]:
    """One row per message (those whose column `by` is equal), and the rows that are gone, by reason.

    Copies that contradict each other in `toxic` all go: nobody knows which is right. But a moderator's decision
    (`decided_at`) does: where there is one, the newest decides, and older or undated copies that say otherwise are
    overruled. A type is what the deciding copies say, else what most copies with the same `toxic` say (a tie is a yes),
    and null where none knows.
    """
    copies = rows.filter(pl.col(by).is_duplicated())
    newest = pl.col("decided_at").max().over(by)
    decides = (newest.is_null() | (pl.col("decided_at") == newest)).fill_null(False)
    said = pl.when("decides").then("toxic")
    copies = copies.with_columns(decides=decides).with_columns(low=said.min().over(by), high=said.max().over(by))
    conflicting = pl.col("low") != pl.col("high")
    overruled = ~conflicting & (pl.col("toxic") != pl.col("low"))
    agreed = copies.filter(~conflicting & ~overruled).sort(by, ~pl.col("decides"), maintain_order=True)
    first = pl.col(by).is_first_distinct()
    types = agreed.group_by(by, maintain_order=True).agg(
        (pl.coalesce(pl.col(name).filter("decides").mean(), pl.col(name).mean()) >= 0.5).cast(pl.Int8) for name in TYPES
    )
    kept = agreed.filter(first).drop(TYPES).join(types, on=by, maintain_order="left")
    gone = {
        "conflicting": copies.filter(conflicting),
        "overruled": copies.filter(overruled),
        "duplicate": agreed.filter(~first),
    }
    single = rows.filter(~pl.col(by).is_duplicated())
    return pl.concat([single, kept.select(rows.columns)]), {name: frame[rows.columns] for name, frame in gone.items()}


def near(rows: pl.DataFrame, others: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """The messages of `rows` that are nearly one of `others`: [hash, other (its hash), similarity (0 to 1)].

    Similarity is that of Jaccard between the sets of words and pairs of neighbouring words, `threshold` the least that
    counts. MinHash finds who is worth comparing; what is compared is exact, so no message goes by mistake.
    """
    from rensa import RMinHash, RMinHashLSH

    if rows.is_empty() or others.is_empty():
        return pl.DataFrame(schema={"hash": pl.UInt64, "other": pl.UInt64, "similarity": pl.Float64})
    ours, theirs = shingles(rows), shingles(others)
    index = RMinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, num_bands=_BANDS)
    index.insert_many(RMinHash.from_token_sets(theirs, _PERMUTATIONS, 0))
    candidates = index.query_all(RMinHash.from_token_sets(ours, _PERMUTATIONS, 0))
    found = []
    for number, (words, near_ones) in enumerate(zip(ours, candidates)):
        alike = [(similarity(words, theirs[other], threshold), other) for other in near_ones]
        best, other = max(alike, default=(0.0, 0))
        if best >= threshold:
            found.append((rows["hash"][number], others["hash"][other], best))
    return pl.DataFrame(found, {"hash": pl.UInt64, "other": pl.UInt64, "similarity": pl.Float64}, orient="row")


def shingles(rows: pl.DataFrame) -> list[list[str]]:
    """The words of each message's key and the pairs of words beside each other, each once."""
    words = rows.select(messages.key(pl.col("text")).str.split(" "))["text"]
    return [list(dict.fromkeys([*line, *map(" ".join, zip(line, line[1:]))])) for line in words.to_list()]


def similarity(ours: list[str], theirs: list[str], threshold: float) -> float:
    """Jaccard's, or 0 where the sizes alone say that it is below the threshold."""
    if min(len(ours), len(theirs)) < threshold * max(len(ours), len(theirs)):
        return 0.0
    shared = len(set(ours).intersection(theirs))
    return shared / (len(ours) + len(theirs) - shared)
