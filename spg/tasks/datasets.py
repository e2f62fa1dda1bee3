"""Where the examples of a task come from: a local file or folder, or the data set on the hub."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spg.core.errors import InputError
from spg.core.files import check_text, parse_json
from spg.core.hub import hub_answers, one_line

# file name extension: what `datasets` calls its reader
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKED = ".gz"


@dataclass(frozen=True)
class Published:
    """A data set on the hub: its name, split, needed columns and configuration."""

    name: str
    split: str
    columns: tuple[str, ...]
    config: str | None = None


def load(published: Published, path: str | None, option: str = "task.path") -> list[dict[str, Any]]:
    """Return the rows of a data set from a path, or from the hub.

    Args:
        published: The data set on the hub, with the columns that are needed.
        path: A file, or a folder with a file for the split; None loads from the hub.
        option: Name of the option that holds `path`, for messages.

    Raises:
        InputError: if the data cannot be read or columns are missing. Without a network and a path the
            message names both ways out.
    """
    if path is not None:
        return read(_file(Path(path), published.split, option), published.columns, option)
    return _from_hub(published, option)


def check_place(path: str | Path, option: str) -> None:
    """Raise InputError if `path`, which the option `option` gives, is neither a file nor a folder."""
    if not Path(path).exists():
        raise InputError(f"{option}={path} is neither a file nor a folder; give one of {', '.join(READERS)}")


def _file(path: Path, split: str, option: str) -> Path:
    """Return the file of a split: `path` itself, or the one of that name in the folder `path`."""
    check_place(path, option)
    if path.is_file():
        return path
    found = files_of(path, split)
    if len(found) != 1:
        raise InputError(
            f"{option}={path}: the folder has {len(found) or 'no'} files named {split} with one of the "
            f"endings {', '.join(READERS)}; exactly one is needed, or give the file itself"
        )
    return found[0]


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder whose names say that they hold a split."""
    names = [split + reader + packed for reader in READERS for packed in ("", PACKED)]
    return sorted(file for file in folder.iterdir() if file.name in names)


def _kind(path: Path) -> str:
    """Return the ending of a file, without that of its compression."""
    return path.with_suffix("").suffix if path.suffix == PACKED else path.suffix


def read(path: Path, columns: Sequence[str], option: str = "task.path") -> list[dict[str, Any]]:
    """Return the rows of a json, jsonl, csv or parquet file; all but parquet may be gzipped (.gz).

    The cells of a CSV file stay text.

    Raises:
        InputError: if the file cannot be used.
    """
    kind = _kind(path)
    reader = READERS.get(kind)
    if reader is None or (reader == "parquet" and path.suffix == PACKED):
        raise InputError(
            f"{option}={path}: {path.suffix or 'no ending'} is unknown; one of {', '.join(READERS)}, "
            f"the first four also with {PACKED} behind"
        )
    import pandas as pd
    from datasets import Dataset

    try:
        if reader == "csv":
            separator = "\t" if kind == ".tsv" else ","
            table = pd.read_csv(path, dtype=str, keep_default_na=False, sep=separator)  # unpacks by itself
            rows = Dataset.from_pandas(table, preserve_index=False).to_list()
        elif reader == "json":
            rows = _json_rows(path)
        else:
            rows = Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"{option}={path} can't be read: {one_line(error)}") from error
    _check(rows, columns, f"{option}={path}")
    return rows


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Read a list of objects, or one object per line, with the values as they are."""
    import gzip

    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == PACKED else content).decode("utf-8")
    if _kind(path) == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
        for number, row in enumerate(rows, start=1):
            try:
                check_text(row)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(parse_json(line))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected one object per line, or a list of objects")
    return rows


def _from_hub(published: Published, option: str) -> list[dict[str, Any]]:
    """Load a split from the hub, or from what `datasets` has cached of it where the hub can't be reached."""
    import datasets
    import huggingface_hub

    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    offline = any(before) or not hub_answers("dataset", published.name)
    try:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = offline
        rows = datasets.load_dataset(published.name, published.config, split=published.split).to_list()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"the data set {published.name} ({published.split}) can't be had from the hub "
            f"({one_line(error)}): connect to the network, or give a local copy with {option}=<file "
            f"or folder> (json, jsonl, csv or parquet with the columns {', '.join(published.columns)})"
        ) from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
    _check(rows, published.columns, published.name)
    return rows


def _check(rows: Sequence[dict[str, Any]], columns: Sequence[str], what: str) -> None:
    if not rows:
        raise InputError(f"{what} has no rows")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in columns if row.get(name) is None]
        if missing:
            raise InputError(
                f"{what}, row {number}: the columns {', '.join(missing)} are missing or empty; it has "
                f"{', '.join(map(str, row))}; needed: {', '.join(columns)}"
            )
