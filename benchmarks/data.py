"""How fast, and in how much memory, the data steps take sets of the published size, beside a pipeline in pandas.

    python benchmarks/data.py                 # every figure, one JSON line each: about five minutes, 5 GB of disk
    python benchmarks/data.py --rows 20000    # at one size
    python benchmarks/data.py --table         # README's tables, from benchmarks/results/data.jsonl

The rows are synthetic: as many as the published sets have, as long, labelled in the same shares, with their defects
(copies, contradictions, near copies, entities, accents, empty cells). A step is the command that the DAG runs, in a
process of its own; its seconds and its peak memory (resident, the mapped file included) are the whole process's.

The pandas pipeline (benchmarks/data_pandas.py) does what `prepare` does and must come to the same messages in the same
splits, or this stops. Both leave out the search for near copies. It is spared what only `prepare` does: the data card,
the version in DVC, and the checks of the command line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import json_line  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "data.jsonl"
STEPS = {
    "validate_raw": ["validate", "--what=raw"],
    "prepare": ["prepare"],
    "validate_prepared": ["validate", "--what=prepared"],
}
WITHOUT_NEAR = "data.near_duplicate=null"

# As published: rows, the median and the longest text in characters, the share of toxic ones.
FULL = {
    "jigsaw-toxic-comment-train.csv": (223_549, 205, 5000, 0.0957),
    "jigsaw-unintended-bias-train.csv": (1_902_194, 202, 1906, 0.080),
    "labeled.csv": (14_412, 80, 7400, 0.335),
}
SIZES = (20_000, 200_000, sum(rows for rows, *_ in FULL.values()))
# Of the toxic English ones.
TYPES = {"severe_toxic": 0.09, "obscene": 0.55, "threat": 0.03, "insult": 0.53, "identity_hate": 0.10}
# Defects, as shares of the rows.
COPY, CONTRADICTION, NEAR_COPY, EMPTY, SHOUTED = 0.02, 0.002, 0.01, 0.0005, 0.01
ENTITY, ACCENT, LINE_BREAKS = 0.01, 0.06, 0.45


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="one size instead of three, in rows over all files")
    parser.add_argument("--table", action="store_true", help="print README's tables from the committed results")
    asked = parser.parse_args()
    if asked.table:
        return print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
    sizes = [asked.rows] if asked.rows else SIZES
    for rows in sizes:
        with tempfile.TemporaryDirectory() as place:
            workspace = Path(place)
            # In a process of its own: the peak that Linux reports for a child starts from its parent's.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rows = sum(pool.submit(write_raw, workspace / "data" / "raw", rows).result().values())
            for name, arguments in STEPS.items():
                measured(name, rows, command(arguments), workspace)
            if rows < max(sizes):
                continue
            measured("prepare_without_near_copies", rows, command([*STEPS["prepare"], WITHOUT_NEAR]), workspace)
            pandas = [str(ROOT / "benchmarks" / "data_pandas.py"), str(workspace), *OVERRIDES]
            measured("pandas_without_near_copies", rows, pandas, workspace)
            require_the_same(workspace / "data" / "processed", workspace / "pandas")


def command(arguments: list[str]) -> list[str]:
    return [str(ROOT / "commands.py"), *arguments, *OVERRIDES]


def measured(name: str, rows: int, arguments: list[str], workspace: Path) -> None:
    """Runs a Python process to its end and prints its seconds and its peak memory."""
    own = {"TOXIC_WORKSPACE": str(workspace), "MLFLOW_TRACKING_URI": f"sqlite:///{workspace}/mlflow.db"}
    own |= {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    with (workspace / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **own}, stdout=log, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if status:
            log.seek(0)
            sys.exit(f"{name} failed: {log.read()[-3000:]}")
    json_line.of_host(f"{name}_seconds", round(seconds, 1), "s", rows=rows)
    json_line.of_host(f"{name}_peak_memory", round(usage.ru_maxrss / 2**20, 2), "GiB", rows=rows)


def require_the_same(ours: Path, theirs: Path) -> None:
    for split in ("train", "val", "test"):
        one, other = (pl.read_parquet(folder / f"{split}.parquet").sort("id") for folder in (ours, theirs))
        one = one.drop("original")  # what cleaning changed, for who shows a message: pandas does not keep it
        if not one.equals(other.select(one.columns).cast(dict(one.schema))):
            sys.exit(f"pandas made another {split} split: {other.height} messages, not {one.height}, or not the same")


def table(figures: list[dict]) -> str:
    """Growth over the sizes, and the comparison with pandas, as Markdown."""
    found = {(figure["name"], figure["rows"]): figure["value"] for figure in figures}
    sizes = sorted({figure["rows"] for figure in figures})
    lines = ["| rows | " + " | ".join(STEPS) + " | together |", "| ---: |" + " ---: |" * (len(STEPS) + 1)]
    for rows in sizes:
        cells = [(found[f"{step}_seconds", rows], found[f"{step}_peak_memory", rows]) for step in STEPS]
        cells.append((sum(seconds for seconds, _ in cells), max(memory for _, memory in cells)))
        lines.append(f"| {rows:,} | " + " | ".join(f"{s:.1f} s, {gib:.2f} GiB" for s, gib in cells) + " |")
    rows = sizes[-1]
    both = {
        name: [found[f"{name}_without_near_copies_{figure}", rows] for figure in ("seconds", "peak_memory")]
        for name in ("prepare", "pandas")
    }
    lines += ["", f"| {rows:,} rows, no near copies | seconds | peak memory |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {seconds:.1f} s | {gib:.2f} GiB |" for name, (seconds, gib) in both.items()]
    ratios = [theirs / ours for ours, theirs in zip(both["prepare"], both["pandas"])]
    lines.append(f"| pandas takes | {ratios[0]:.1f} times | {ratios[1]:.1f} times |")
    return "\n".join(lines)


def sources() -> list[str]:
    entries = [
        f"{{kind: folder, name: raw, file: {file}, schema: {'russian' if russian else 'jigsaw'}, "
        f"language: {'ru' if russian else 'en'}}}"
        for file, russian in ((file, file == "labeled.csv") for file in FULL)
    ]
    return ["data=folder", "data.folder=raw", f"data.sources=[{', '.join(entries)}]"]


OVERRIDES = sources()


# Synthetic rows


def write_raw(folder: Path, rows: int, seed: int = 0) -> dict[str, int]:
    """Writes Kaggle's three files into `folder`, about `rows` rows together; returns {file: rows}."""
    folder.mkdir(parents=True, exist_ok=True)
    share = rows / sum(count for count, *_ in FULL.values())
    written = {}
    for number, (file, (full, median, longest, toxic_share)) in enumerate(FULL.items()):
        rng = np.random.default_rng([seed, number])
        count = max(1000, round(full * share))
        frame = synthetic(rng, count, median, longest, toxic_share, "ru" if file == "labeled.csv" else "en")
        if file == "labeled.csv":
            frame = frame.select(comment=pl.col("text") + "\n", toxic=pl.col("toxic").cast(pl.Float64))
        else:
            ids = pl.Series("id", [f"{number}{k:015x}" for k in range(count)])
            frame = frame.select(ids, pl.col("text").alias("comment_text"), pl.exclude("text"))
        frame.write_csv(folder / file)
        written[file] = count
    return written


def synthetic(rng, count: int, median: int, longest: int, toxic_share: float, language: str) -> pl.DataFrame:
    """`text` and the six labels: words by Zipf's law in sentences, log-normal lengths, the defects above."""
    letters = list("абвгдежзиклмнопрстуфхчшыя" if language == "ru" else "abcdefghijklmnopqrstuvwxyz")
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(1, 11, 20_000)])
    drawn = np.minimum(rng.zipf(1.3, (200_000, 9)) - 1, len(words) - 1)
    sentences = pl.DataFrame([pl.Series(words[column]) for column in drawn.T])
    sentences = sentences.select(pl.concat_str(pl.all(), separator=" ") + pl.lit(".")).to_series()
    length = sentences.str.len_chars().mean()
    number = np.clip(rng.lognormal(np.log(median / length), 0.9, count).round(), 1, longest // length).astype(int)
    breaks = pl.Series(rng.random(count) < LINE_BREAKS)
    ends = np.cumsum(number)
    pieces = pl.DataFrame({"text": np.repeat(np.arange(count), number), "sentence": rng.integers(0, 200_000, ends[-1])})
    texts = (
        pieces.lazy()
        .with_columns(sentence=pl.lit(sentences).gather(pl.col("sentence")))
        .group_by("text", maintain_order=True)
        .agg(pl.col("sentence").str.join(" "))
        .collect()["sentence"]
    )
    tails = pl.Series(words[rng.integers(0, len(words), count)])
    frame = pl.DataFrame({"text": texts, "tail": tails, "breaks": breaks}).select(
        text=pl.when("breaks").then(pl.col("text").str.replace(". ", ".\n\n", literal=True)).otherwise("text")
        + " "
        + pl.col("tail")
    )
    toxic = rng.random(count) < toxic_share
    labels = {"toxic": toxic} | {name: toxic & (rng.random(count) < share) for name, share in TYPES.items()}
    if language == "ru":
        labels = {"toxic": toxic}
    frame = frame.with_columns(pl.Series(name, values.astype(np.int8)) for name, values in labels.items())
    return with_defects(rng, frame)


def with_defects(rng, frame: pl.DataFrame) -> pl.DataFrame:
    draw = pl.Series(rng.random(frame.height))
    earlier = frame[rng.integers(0, frame.height, frame.height)]
    text, other = pl.col("text"), earlier["text"]
    copied = draw < COPY + CONTRADICTION
    near = (draw >= COPY + CONTRADICTION) & (draw < COPY + CONTRADICTION + NEAR_COPY)
    frame = frame.with_columns(
        pl.when(copied | near).then(earlier[name]).otherwise(name).alias(name) for name in frame.columns
    ).with_columns(
        toxic=pl.when(draw < CONTRADICTION).then(1 - pl.col("toxic")).otherwise("toxic"),
        text=pl.when(near).then(other.str.replace(" ", " indeed, ", literal=True)).otherwise("text"),
    )
    entity, accent, empty, shout = (pl.Series(rng.random(frame.height)) for _ in range(4))
    return frame.with_columns(
        text=pl.when(empty < EMPTY)
        .then(pl.lit(None))
        .when(entity < ENTITY)
        .then(text + " &quot;so&quot; &amp; on")
        .when(accent < ACCENT)
        .then(text + pl.lit(" “naïve” – cafe\u0301"))
        .when(shout < SHOUTED)
        .then(text.str.to_uppercase())
        .otherwise("text")
    )


if __name__ == "__main__":
    main()
