"""Where rows come from: a local file (JSONL, JSON, Parquet), a folder of them, a saved or named Hugging Face data set, or any object with ``rows()``.

Nothing here executes code from a data set: dataset scripts are never run, and files are parsed, not unpickled.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Record = Mapping[str, Any]
SKIP = "__skip__"
"""An adapter that leaves a row out yields ``{SKIP: reason}`` in its place, so that it is counted."""
SAVED = ("state.json", "dataset_dict.json")
"""What the datasets library leaves beside the data of a set it has saved to disk."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


class DataError(ValueError):
    """A data set that cannot be used as asked.  The message says which, what is wrong and what to change."""


@runtime_checkable
class Rows(Protocol):
    """Any source of rows: a procedural world, a database, a list in disguise."""

    def rows(self) -> Iterable[Record]: ...


def read_rows(source: str | Path | Rows | Iterable[Record], *, split: str = "train", subset: str | None = None) -> Iterator[Record]:
    """Rows of a source, in order.

    ``source``: a file, a folder (its data files in name order, or a data set saved there by ``save_to_disk``), a Hugging Face id (``split`` and ``subset`` choose the part), an object
    with ``rows()``, or a plain iterable of mappings.  Raises :class:`DataError` for anything missing or unreadable, with file and line.
    """
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir() and any((path / mark).exists() for mark in SAVED):
            yield from _read_saved(path, split)
        elif path.is_dir():
            files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
            if not files:
                raise DataError(f"{path} holds no data file; expected one of {', '.join(SUFFIXES)}")
            for file in files:
                yield from _read_file(file)
        elif path.exists():
            yield from _read_file(path)
        elif str(source).endswith(SUFFIXES) or str(source).startswith((".", "/", "~")):
            near = sorted(p.name for p in path.parent.iterdir() if p.name.endswith(SUFFIXES)) if path.parent.is_dir() else []
            beside = (
                f"; in that folder: {', '.join(near[:8])}"
                if near
                else f"; the folder {path.parent} does not exist" * (not path.parent.is_dir())
            )
            raise DataError(f"no such data file: {path}{beside}")
        else:
            yield from _read_hub(str(source), split, subset)
    else:
        rows = source.rows() if isinstance(source, Rows) else source
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(
                    f"row {number} of {type(source).__name__} is a {type(row).__name__}; rows must be mappings from column to value"
                )
            yield row


def _read_file(path: Path) -> Iterator[Record]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from _read_parquet(path)
    elif name.endswith(".jsonl"):
        yield from _read_lines(path)
    elif name.endswith(".json"):
        yield from _read_json(path)
    else:
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")


def _read_lines(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.rstrip("\n"))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}, column {error.colno}: not JSON ({error.msg}): {line.strip()!r:.80}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: a row must be a JSON object, not {type(row).__name__}")
                yield row
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: cannot be read ({error}); the file is damaged or not UTF-8") from None


def _read_json(path: Path) -> Iterator[Record]:
    """A list of objects; an object whose only list is the rows; or JSONL under the wrong name."""
    with _open(path) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_lines(path)
            return
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else [value]
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: a row must be a JSON object, not {type(row).__name__}")
        yield row


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or give a JSONL file") from None
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _read_saved(path: Path, split: str) -> Iterator[Record]:
    """A data set that ``save_to_disk`` wrote; of several splits, the named one."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path} was written by the datasets package and needs it to be read; pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # Arrow, JSON and file errors of many types
        raise DataError(f"{path}: cannot be read as a saved data set ({type(error).__name__}: {str(error).splitlines()[0]:.200})") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(loaded)}: set split=NAME")
        loaded = loaded[split]
    for row in loaded:
        yield dict(row)


def _read_hub(name: str, split: str, subset: str | None) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name!r} is no local file, and Hugging Face ids need the datasets package; pip install datasets") from None
    where = f"{name!r}{f' ({subset})' if subset else ''}, split {split!r}"
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types for "not there" and "not reachable"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{where} is neither a local file nor a data set that could be loaded: {type(error).__name__}: {reason:.300}. Check the "
            "name, the split and the subset; without a network, give the path of a JSONL or Parquet file"
        ) from None
    for row in loaded:
        yield dict(row)
