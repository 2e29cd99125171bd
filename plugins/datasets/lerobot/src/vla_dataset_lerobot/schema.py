"""The tables of a LeRobotDataset v3.0 as Arrow schemas, with the metadata that its readers look for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from vla.datasets import DatasetInfo
from vla_dataset_lerobot.meta import IMAGE_PREFIX

# Columns that every dataset has after its own.
AUTO = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
TYPES = {
    "float32": pa.float32(),
    "float64": pa.float64(),
    "int64": pa.int64(),
    "int32": pa.int32(),
    "bool": pa.bool_(),
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def features_of(info: DatasetInfo, video: bool = False) -> dict[str, dict[str, Any]]:
    """The `features` of a dataset with the cameras, state and action that `info` declares."""

    def vector(dim: int, names: tuple[str, ...], units: tuple[str, ...]) -> dict[str, Any]:
        feature: dict[str, Any] = {"dtype": "float32", "shape": [dim], "names": list(names) or None}
        return {**feature, "info": {"units": list(units)}} if units else feature

    cameras = {
        IMAGE_PREFIX + name: {
            "dtype": "video" if video else "image",
            "shape": [h, w, 3],
            "names": ["height", "width", "channels"],
        }
        for name, (h, w) in info.cameras.items()
    }
    return {
        **cameras,
        "observation.state": vector(info.state_dim, info.state_names, info.units.get("state", ())),
        "action": vector(info.action_dim, info.action_names, info.units.get("actions", ())),
    }


def frames_schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """The schema of the parquet files of frames; videos are not in them."""
    fields, described = [], {}
    for key, feature in features.items():
        if feature["dtype"] == "video":
            continue
        if feature["dtype"] == "image":
            fields.append((key, IMAGE))
            described[key] = {"_type": "Image"}
            continue
        value = {"dtype": feature["dtype"], "_type": "Value"}
        kind, width = TYPES[feature["dtype"]], int(np.prod(feature["shape"]))
        single = tuple(feature["shape"]) == (1,)
        fields.append((key, kind if single else pa.list_(kind, width)))
        described[key] = value if single else {"feature": value, "length": width, "_type": "List"}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": described}})})


def tasks_table(tasks: Mapping[str, int]) -> pa.Table:
    """tasks.parquet as pandas writes a table whose index is the task: readers look tasks up by row number and index."""
    column = {
        "numpy_type": "int64",
        "pandas_type": "int64",
        "name": "task_index",
        "field_name": "task_index",
        "metadata": None,
    }
    index = {"numpy_type": "object", "pandas_type": "unicode", "name": "task", "field_name": "task", "metadata": None}
    level = {
        "name": None,
        "field_name": None,
        "pandas_type": "unicode",
        "numpy_type": "object",
        "metadata": {"encoding": "UTF-8"},
    }
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [level],
        "columns": [column, index],
        "attributes": {},
        "pandas_version": "2.2.0",
    }
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], {"pandas": json.dumps(pandas)})
    return pa.table([list(tasks.values()), list(tasks)], schema=schema)


def episode_type(name: str, cameras: Mapping[str, str]) -> pa.DataType:
    """The type of one column of the table of episodes."""
    if name == "tasks":
        return pa.list_(pa.string())
    if name.startswith("stats/"):
        if name.endswith("/count"):
            return pa.list_(pa.int64())
        single = pa.list_(pa.float64())
        return pa.list_(pa.list_(single)) if name.split("/")[1] in cameras else single
    return pa.float64() if name.endswith("_timestamp") else pa.int64()
