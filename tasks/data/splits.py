"""The prepared splits, as `prepare` has written them: data/processed/{train,val,test}.parquet."""

from pathlib import Path

import polars as pl

from tasks.errors import StepFailed, UsageError

SPLITS = ("train", "val", "test")


def require(workspace: Path, split: str = "train") -> Path:
    """The file of a split.

    Raises:
        UsageError: nothing is prepared.
    """
    file = workspace / "data" / "processed" / f"{split}.parquet"
    if not file.is_file():
        raise UsageError(f"{file} does not exist: run `python commands.py download` and `python commands.py prepare`")
    return file


def read(workspace: Path, split: str) -> pl.DataFrame:
    """Rows of `train`, `val` or `test`: id, text, language, source and the six labels (null where unknown).

    Raises:
        UsageError: nothing is prepared.
        StepFailed: the file is damaged.
    """
    file = require(workspace, split)
    try:
        return pl.read_parquet(file, glob=False)
    except pl.exceptions.ComputeError as error:
        raise StepFailed(
            f"{file} is damaged ({error}): run `python commands.py prepare` again, or bring back what a registered "
            "version was trained on (`python commands.py data --version=N --replace`)"
        ) from None
