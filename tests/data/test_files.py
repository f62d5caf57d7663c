"""Every source of rows, and one readable message for everything that can be wrong with it."""

import gzip
import json
import sys

import pytest

from posttrain.data.files import DataError, read_rows

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b\u2019s", "answer": "2"}]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n\n"


def write_parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {
    "a.jsonl": lambda p: p.write_text(LINES),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES.encode())),
    "a.json": lambda p: p.write_text(json.dumps(ROWS)),
    "wrapped.json": lambda p: p.write_text(json.dumps({"version": 1, "data": ROWS})),
    "really_jsonl.json": lambda p: p.write_text(LINES),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert list(read_rows(str(tmp_path / name))) == ROWS
    assert list(read_rows(tmp_path)) == ROWS, "a folder is its files"


def test_a_data_set_saved_by_its_library(tmp_path):
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "splits")
    assert list(read_rows(tmp_path / "one")) == list(read_rows(str(tmp_path / "splits"))) == ROWS
    assert list(read_rows(tmp_path / "splits", split="test")) == ROWS[1:]
    with pytest.raises(DataError, match=r"no split 'dev'; it has train, test"):
        list(read_rows(tmp_path / "splits", split="dev"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read as a saved data set"):
        list(read_rows(tmp_path / "one"))


def test_objects_with_rows_and_plain_lists():
    class World:
        def rows(self):
            return iter(ROWS)

    assert list(read_rows(World())) == ROWS == list(read_rows(ROWS))
    with pytest.raises(DataError, match="row 0 of list is a str"):
        list(read_rows(["text"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', r"a\.jsonl, line 2, column 8: not JSON .*'\{\"a\": 2'"),
        ("a.jsonl", "[1]\n", "line 1: a row must be a JSON object, not list"),
        ("a.json", '{"a": ', r"a\.json, line 1, column 7: not JSON"),
        ("a.json", "[1, 2]", "row 0: a row must be a JSON object, not int"),
        ("a.parquet", "no parquet", "cannot be read as Parquet"),
        ("a.csv", "x,y", "unknown kind of file; expected one of .jsonl"),
        ("a.jsonl.gz", "plain", "after line 0: cannot be read"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / name))


def test_missing_files(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"no such data file: .*trian\.jsonl; in that folder: train\.jsonl"):
        list(read_rows(str(tmp_path / "trian.jsonl")))
    with pytest.raises(DataError, match=r"the folder .*nowhere does not exist"):
        list(read_rows(str(tmp_path / "nowhere" / "a.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        list(read_rows(tmp_path / "empty"))


def test_hub_ids_are_read_without_running_code(monkeypatch):
    import datasets

    seen = {}

    def load(name, subset, **kw):
        seen.update(name=name, subset=subset, **kw)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows("org/set", split="test", subset="main")) == ROWS
    assert seen == {"name": "org/set", "subset": "main", "split": "test"}

    def offline(*args, **kw):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'org/set', split 'train' is neither a local file.*Couldn't reach the Hub\. Check.*without a network"
    ) as error:
        list(read_rows("org/set"))
    assert "long trace" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        list(read_rows("org/set"))
