"""Writes rows as every source of rows reads them."""

import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow
from pyarrow import parquet

FORMATS = ("jsonl", "jsonl.gz", "parquet", "hf")


def write_rows(
    folder: pathlib.Path, form: str, splits: dict[str, list[dict[str, Any]]], **features: Any
) -> str:
    """Write a set; return what names it as a source.

    `splits` are rows by name of a split, which is the beginning of the file's name. `features` are
    those of `datasets` that are not plain texts.
    """
    if form == "hf":
        write_dataset_dict(folder, splits, features)
        return f"hf:{folder}"
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        file = folder / f"{name}.{form}"
        if form == "parquet":
            parquet.write_table(make_table(rows), file, row_group_size=7)
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            file.write_bytes(gzip.compress(lines) if form.endswith(".gz") else lines)
    return f"{form.partition('.')[0]}:{folder}"


def write_dataset_dict(folder, splits, features) -> None:
    """Write what `DatasetDict.save_to_disk` of datasets 5.2 writes."""
    folder.mkdir(exist_ok=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for name, rows in splits.items():
        write_dataset(folder / name, rows, features)


def write_dataset(folder, rows: Sequence[dict[str, Any]], features) -> None:
    """Write what `Dataset.save_to_disk` writes, in two files."""
    folder.mkdir(exist_ok=True)
    plain = {"dtype": "string", "_type": "Value"}
    described = {key: features.get(key, plain) for key in rows[0]}
    (folder / "dataset_info.json").write_text(json.dumps({"features": described}))
    files, half = [], (len(rows) + 1) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        files.append({"filename": f"data-0000{number}-of-00002.arrow"})
        table = make_table(part, make_table(rows).schema)
        with pyarrow.ipc.new_stream(folder / files[-1]["filename"], table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    state = {"_data_files": files, "_fingerprint": "0", "_format_columns": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def make_table(rows, schema=None) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(list(rows), schema)
