"""What `prepare` does, in plain pandas: the other side of benchmarks/data.py.

    python benchmarks/data_pandas.py WORKSPACE [hydra.override=value …]

Reads WORKSPACE/data/raw and writes WORKSPACE/pandas/{train,val,test}.parquet. Text columns are pandas' own strings,
backed by Arrow; what pandas has no function for (cleaning, a stable hash) is a Python function for each row.
"""

import sys
from pathlib import Path

import pandas as pd
import polars as pl
import xxhash

from tasks import config as configuration
from tasks.data import sampling, split_key
from tasks.labels import LABELS, TYPES
from tasks.text import clean_start

TEXT = {"jigsaw": "comment_text", "russian": "comment"}
PUNCTUATION = r"(?: *[^\p{L}\p{M}\p{N}\p{S}*@# ])+ *"  # Arrow's expressions know these classes, Python's do not


def main(workspace: Path, overrides: list[str]) -> None:
    config = configuration.load(overrides)
    rows = pd.concat([read(source, config.data, workspace) for source in config.data.sources], ignore_index=True)
    rows = merged(rows[rows["text"] != ""])
    rows = sampled(rows, config.data)
    rows["id"] = rows["hash"].map(lambda hash_: f"{hash_:016x}")
    place = places(rows["hash"], config.data.split.salt, "split")
    train, val = config.data.split.train, config.data.split.train + config.data.split.val
    (workspace / "pandas").mkdir()
    for name, low, high in (("train", 0, train), ("val", train, val), ("test", val, 2)):
        split = rows.loc[(place >= low) & (place < high), ["id", "text", "language", "source", *LABELS]]
        split.sort_values("id").to_parquet(workspace / "pandas" / f"{name}.parquet", index=False)


def read(source, data, workspace: Path) -> pd.DataFrame:
    known = [name for name in LABELS if name == "toxic" or source.schema_ == "jigsaw"]
    wanted = [TEXT[source.schema_], *known]
    raw = pd.read_csv(workspace / "data" / "raw" / source.file, usecols=wanted, dtype=dict.fromkeys(wanted, "str"))
    written = raw[TEXT[source.schema_]].fillna("")
    text = written.map(lambda one: clean_start(one, data.max_chars))
    lower = written.map(split_key.clean).str.slice(0, data.max_chars).str.rstrip(" ").str.lower()
    key = lower.str.replace(PUNCTUATION, " ", regex=True).str.strip(" ")
    rows = pd.DataFrame({"text": text, "hash": key.where(key != "", lower).map(hashed).astype("uint64")})
    rows["language"], rows["source"] = source.language, source.file
    for name in LABELS:
        rows[name] = pd.array([pd.NA] * len(rows), "Int8")
        if name in known:
            labels = pd.to_numeric(raw[name])
            if not labels.isin([0, 1]).all():
                sys.exit(f"{source.file}: {name} has labels beside 0 and 1")
            rows[name] = labels.astype("Int8")
    return rows


def merged(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per message, without those that contradict each other."""
    copied = rows["hash"].duplicated(keep=False)
    copies = rows[copied]
    by_message = copies.groupby("hash")
    agreed = copies[by_message["toxic"].transform("min") == by_message["toxic"].transform("max")]
    first = agreed.drop_duplicates("hash").set_index("hash")
    share = agreed.groupby("hash")[list(TYPES)].mean()
    for name in TYPES:
        first[name] = (share[name] >= 0.5).astype("Int8").where(share[name].notna())
    return pd.concat([rows[~copied], first.reset_index()], ignore_index=True)


def sampled(rows: pd.DataFrame, data) -> pd.DataFrame:
    if len(rows) <= data.max_samples:
        return rows.copy()
    by_rarity = rows[list(TYPES)].sum().sort_values(kind="stable").index
    rows["rarest"] = "none"
    for name in reversed(by_rarity):
        rows.loc[(rows[name] == 1).fillna(False), "rarest"] = name
    rows["place"] = places(rows["hash"], data.split.salt, "keep")
    stratum = list(sampling.STRATUM)
    counts = rows.groupby(stratum).size().reset_index(name="rows")
    quotas = sampling.quotas(pl.from_pandas(counts), data).to_pandas().set_index(stratum)["quota"]
    rank = rows.groupby(stratum)["place"].rank("first")
    limit = pd.MultiIndex.from_frame(rows[stratum]).map(quotas)
    return rows[rank <= pd.Series(limit, rows.index)].copy()


def hashed(text: str) -> int:
    return xxhash.xxh64_intdigest(text.encode())


def places(hashes: pd.Series, salt: str, purpose: str) -> pd.Series:
    return hashes.map(lambda hash_: hashed(f"{salt}:{purpose}:{hash_}") / 2**64)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
