"""What a figure function was given, as one small file beside the figure: `NAME.call.zip`.

`store()`  write a call: the function's name, its arguments, and how it was saved
`load()`   read one back; what it names must be a figure function of `gnetlab.draw`

`call.json` holds the call; every JSON object in it is {kind: content}, for what JSON does not have.
Arrays are `N.npy`. Nothing is pickled, and the same call gives the same bytes.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

SUFFIX = ".call.zip"
FORMAT = 1
_MASKED = (pd.arrays.IntegerArray, pd.arrays.FloatingArray, pd.arrays.BooleanArray)


class Call(NamedTuple):
    """A figure function with its arguments, and whether what it shows was measured in seconds."""

    function: Callable
    arguments: tuple
    options: dict[str, Any]
    timing: bool = False


def store(call: Call, path: Path) -> None:
    """Write `call` to `path`; TypeError for an argument that cannot be kept exactly."""
    arrays: list[np.ndarray] = []
    content = {
        "format": FORMAT,
        "function": f"{call.function.__module__}:{call.function.__name__}",
        "arguments": [_encode(value, arrays) for value in call.arguments],
        "options": [[name, _encode(value, arrays)] for name, value in call.options.items()],
        "timing": call.timing,
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        _add(archive, "call.json", text.encode())
        for i, array in enumerate(arrays):
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            _add(archive, f"{i}.npy", buffer.getvalue())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name)  # of 1980, whenever it is written
    entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
    archive.writestr(entry, content)


def load(path: Path) -> Call:
    """The call in `path`; ValueError if that is no stored call of a figure function."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = json.loads(archive.read("call.json"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, this gnetlab reads {FORMAT}")
            function = _figure_function(content["function"])

            def array(number: int) -> np.ndarray:
                return np.load(io.BytesIO(archive.read(f"{number:d}.npy")), allow_pickle=False)

            return Call(
                function,
                tuple(_decode(value, array) for value in content["arguments"]),
                {name: _decode(value, array) for name, value in content["options"]},
                bool(content["timing"]),
            )
    except Exception as error:  # the file may be damaged in any way, or made to be
        raise ValueError(
            f"{path} cannot be read as a stored figure ({type(error).__name__}: {error}); "
            "run `gnetlab report` again"
        ) from error


def _figure_function(name: str) -> Callable:
    """Only what is marked as a figure function: the file may come from anyone."""
    module, _, function = name.partition(":")
    if re.fullmatch(r"gnetlab\.draw\.[a-z]+", module):
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError):
            found = None
        if getattr(found, "is_figure_function", False):
            return found
    raise ValueError(f"it names {name!r}, which is no figure function of gnetlab.draw")


def _encode(value: object, arrays: list[np.ndarray]) -> Any:
    def inner(values) -> list:
        return [_encode(v, arrays) for v in values]

    if value is None or type(value) in (bool, int, float, str):
        return value
    if value is pd.NA:
        return {"NA": 0}
    if isinstance(value, pd.DataFrame):
        columns = [_values(value.iloc[:, i], arrays) for i in range(value.shape[1])]
        return {"frame": [columns, *inner([value.columns, value.index])]}
    if isinstance(value, pd.Series):
        return {"series": [_values(value, arrays), *inner([value.index, value.name])]}
    if isinstance(value, pd.RangeIndex):
        return {"range": [value.start, value.stop, value.step, *inner([value.name])]}
    if isinstance(value, pd.MultiIndex):
        codes = [np.asarray(code).tolist() for code in value.codes]
        return {"levels": [inner(value.levels), codes, inner(value.names)]}
    if isinstance(value, pd.Index):
        return {"index": [_values(value, arrays), *inner([value.name])]}
    if isinstance(value, np.generic) and value.dtype.kind in "biufU":
        return {"scalar": [value.dtype.str, value.item()]}
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return {"objects": [list(value.shape), inner(value.ravel())]}
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, Mapping):
        return {"dict": [inner(pair) for pair in value.items()]}
    if isinstance(value, (list, tuple)):
        return inner(value) if type(value) is list else {"tuple": inner(value)}
    raise TypeError(
        f"an argument of the figure holds a {type(value).__name__}, which cannot be kept for "
        "redrawing; give frames, arrays, lists, dicts and plain values"
    )


def _values(labelled: pd.Series | pd.Index, arrays: list[np.ndarray]) -> Any:
    """What a column or an index consists of, with its dtype."""
    values, dtype = labelled.array, labelled.dtype
    if isinstance(dtype, np.dtype):
        return _encode(labelled.to_numpy(), arrays)
    if isinstance(dtype, pd.CategoricalDtype):
        categories = _encode(dtype.categories, arrays)
        return {"categories": [categories, values.codes.tolist(), bool(dtype.ordered)]}
    if isinstance(dtype, pd.StringDtype):
        missing_is_nan = isinstance(dtype.na_value, float)
        return {"strings": [missing_is_nan, [None if pd.isna(v) else str(v) for v in values]]}
    if isinstance(values, _MASKED):
        return {"masked": [dtype.name, [_encode(v, arrays) for v in values.astype(object)]]}
    raise TypeError(
        f"a column of dtype {dtype} cannot be kept for redrawing; give numbers, text or booleans"
    )


def _decode(value: Any, array: Callable[[int], np.ndarray]) -> Any:
    def inner(values) -> list:
        return [_decode(v, array) for v in values]

    if isinstance(value, list):
        return inner(value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "NA":
            return pd.NA
        case "frame":
            columns, names, index = inner(content)
            frame = {i: pd.Series(v, index, dtype=v.dtype) for i, v in enumerate(columns)}
            return pd.DataFrame(frame, index).set_axis(names, axis=1)
        case "series":
            values, index, name = inner(content)
            return pd.Series(values, index, dtype=values.dtype, name=name)
        case "range":
            return pd.RangeIndex(*content[:3], name=_decode(content[3], array))
        case "levels":
            return pd.MultiIndex(inner(content[0]), content[1], names=inner(content[2]))
        case "index":
            values, name = inner(content)
            return pd.Index(values, dtype=values.dtype, name=name)
        case "scalar":
            return np.dtype(content[0]).type(content[1])
        case "objects":
            values = np.empty(content[0], object)
            for i, item in enumerate(inner(content[1])):
                values.flat[i] = item
            return values
        case "array":
            return array(content)
        case "dict":
            return dict(inner(content))
        case "tuple":
            return tuple(inner(content))
        case "categories":
            return pd.Categorical.from_codes(content[1], _decode(content[0], array), content[2])
        case "strings":
            missing = np.nan if content[0] else pd.NA
            return pd.array(content[1], dtype=pd.StringDtype(na_value=missing))
        case "masked":
            return pd.array(inner(content[1]), dtype=content[0])
    raise ValueError(f"unknown kind {kind!r}")
