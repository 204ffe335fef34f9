"""What moved between two reports: verdicts, numbers, statuses, figures; and what may be why.

`load()`     a report's manifest and its folder
`compare()`  two of them, to a `Comparison`

A change is relative to the old number, (new - old) / |old|. NaN equals NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnetlab.report.claims import CLAIMS
from gnetlab.report.plan import GOOD

_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """One thing that differs between reports A and B.

    kind      verdict, number, notebook, figure or column; of a context: its key
    name      what it is, with the run and the claim or figure that it belongs to
    old, new  as text; "-" where one report lacks it
    relative  (new - old) / |old|, of a column the largest; None if it is not a number
    timing    measured on a clock, so it differs from run to run
    """

    kind: str
    name: str
    old: str
    new: str
    relative: float | None = None
    timing: bool = False


@dataclass
class Comparison:
    """`moved`: results that differ. `context`: settings that do, the reader's reasons."""

    moved: list[Change] = field(default_factory=list)
    context: list[Change] = field(default_factory=list)

    def differs(self, *, ignore_timing: bool = False) -> bool:
        """Whether something moved, without what was timed if `ignore_timing`."""
        return any(not (ignore_timing and change.timing) for change in self.moved)


def load(path: Path) -> tuple[dict[str, Any], Path]:
    """The manifest of a report, and the report's folder; `path` is the folder or its manifest.

    Raises ValueError if there is none, or it is no manifest.
    """
    file = path / "manifest.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"{path}: no report there (looked for {file}); give a folder that gnetlab report "
            "has written, or its manifest.json"
        )
    try:
        # NaN is text in a report of now, as it is then in an older one.
        manifest = json.loads(file.read_text(encoding="utf-8"), parse_constant=str)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as JSON: {error}; make the report again"
        ) from error
    lists = isinstance(manifest, dict) and all(
        isinstance(manifest.get(key), list) for key in ("notebooks", "claims")
    )
    if not lists:
        raise ValueError(
            f"{file} is no report's manifest: it lacks notebooks and claims; give a folder that "
            "gnetlab report has written"
        )
    return manifest, file.parent


def compare(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    folders: tuple[Path, Path] | None = None,
    *,
    tolerance: float = 0.0,
    ignore_timing: bool = False,
) -> Comparison:
    """What moved from manifest `a` to manifest `b`.

    folders        the reports' folders; with them the tables of figures that differ are compared
    tolerance      relative changes up to it are no change; a figure whose table has not changed
                   by more then counts as the same, however it was drawn
    ignore_timing  leave figures that show times out
    """
    found = Comparison()
    _compare_claims(a, b, tolerance, found)
    ours, theirs = ({n["name"]: n for n in m["notebooks"]} for m in (a, b))
    for name in dict.fromkeys([*ours, *theirs]):
        old, new = ours.get(name), theirs.get(name)
        states = [_state(entry) for entry in (old, new)]
        if states[0] != states[1]:
            found.moved.append(Change("notebook", name, *states))
        if old and new:
            _compare_figures(old, new, folders, tolerance, ignore_timing, found)
            for key in ("parameters", "facts", "inputs"):
                _compare_context(f"{name} {key}", old.get(key), new.get(key), found)
    for key in ("gnetlab", "git", "python", "platform", "system", "packages"):
        _compare_context(key, a.get(key), b.get(key), found)
    return found


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts and lists with its dotted name: {"p": {"3a": 1}} has p.3a."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from flatten(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _state(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return "done" if entry["status"] in GOOD else entry["status"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def relative_change(old: Any, new: Any) -> float | None:
    """0 if equal (NaN equals NaN), NaN if only one is NaN, None unless both are numbers."""
    if not (_is_number(old) and _is_number(new)):
        return None
    if old == new or (math.isnan(old) and math.isnan(new)):
        return 0.0
    if not (math.isfinite(old) and math.isfinite(new)):
        return math.nan
    return (new - old) / abs(old) if old else math.copysign(math.inf, new)


def _within(old: Any, new: Any, tolerance: float) -> bool:
    relative = relative_change(old, new)
    return old == new if relative is None else abs(relative) <= tolerance


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _pairs(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Names in either, with both values."""
    old, new = dict(flatten(old or {})), dict(flatten(new or {}))
    for name in dict.fromkeys([*old, *new]):
        yield name, old.get(name, _ABSENT), new.get(name, _ABSENT)


def _compare_claims(a: Mapping, b: Mapping, tolerance: float, found: Comparison) -> None:
    # With a grid a claim is judged once in every run; one that nobody judged has its notebook.
    ours, theirs = (
        {(c["id"], c.get("run") or c["notebook"]): c for c in m["claims"]} for m in (a, b)
    )
    numbers = []
    for key in dict.fromkeys([*ours, *theirs]):
        old, new = ours.get(key, {}), theirs.get(key, {})
        verdicts = [claim.get("verdict", "-") for claim in (old, new)]
        claim_id, run = key
        if verdicts[0] != verdicts[1]:
            found.moved.append(Change("verdict", f"{run} {claim_id}", *verdicts))
        for name, before, after in _pairs(old.get("measured"), new.get("measured")):
            if not _within(before, after, tolerance):
                numbers.append(
                    Change("number", f"{run} {claim_id} {name}", _text(before), _text(after),
                           relative_change(before, after), _is_time(claim_id, name))
                )  # fmt: skip
    found.moved += numbers


def _is_time(claim_id: str, name: str) -> bool:
    """By what the claim says of the number that it needs."""
    claim = CLAIMS.get(claim_id)
    meaning = claim.needs.get(name.partition(".")[0], "") if claim else ""
    return "time" in meaning.split()


def _compare_figures(
    old: Mapping,
    new: Mapping,
    folders: tuple[Path, Path] | None,
    tolerance: float,
    ignore_timing: bool,
    found: Comparison,
) -> None:
    ours, theirs = ({f["name"]: f for f in entry.get("figures") or []} for entry in (old, new))
    for name in dict.fromkeys([*ours, *theirs]):
        pair = [figures.get(name) for figures in (ours, theirs)]
        timing = any(figure and figure.get("timing") for figure in pair)
        if timing and ignore_timing:
            continue
        about = f"{old['name']} {name}"
        if None in pair:
            there = ["-" if figure is None else "there" for figure in pair]
            found.moved.append(Change("figure", about, *there, timing=timing))
            continue
        hashes = [{k: f["sha256"] for k, f in figure["files"].items()} for figure in pair]
        if hashes[0] == hashes[1]:
            continue
        tables = [
            _table(folder, entry, figure)
            for folder, entry, figure in zip(folders or (), (old, new), pair, strict=bool(folders))
        ]
        columns = _columns(about, *tables, tolerance, timing) if _both(tables) else []
        differing = [k for k in dict.fromkeys([*hashes[0], *hashes[1]])
                     if hashes[0].get(k) != hashes[1].get(k)]  # fmt: skip
        looks_alike = tolerance or not {"png", "svg", "pdf"} & {*differing}
        if columns or not (looks_alike and _both(tables)):
            sides = [", ".join(k for k in differing if k in kinds) or "-" for kinds in hashes]
            found.moved.append(Change("figure", about, *sides, timing=timing))
            found.moved += columns


def _both(tables: list) -> bool:
    return len(tables) == 2 and all(table is not None for table in tables)


def _table(folder: Path, entry: Mapping, figure: Mapping):
    """A figure's table, or None; published figures all lie in one folder."""
    import pandas as pd

    if "csv" not in figure["files"]:
        return None
    path = figure["files"]["csv"]["path"]
    for file in (folder / (entry.get("folder") or "") / path, folder / path):
        if file.is_file():
            try:
                return pd.read_csv(file)
            except ValueError:  # pandas' own errors are of this kind
                return None
    return None


def _columns(about: str, old: Any, new: Any, tolerance: float, timing: bool) -> list[Change]:
    """The columns of two tables that moved."""
    if len(old) != len(new):
        sizes = (f"{len(table)} rows" for table in (old, new))
        return [Change("column", f"{about} (all)", *sizes, timing=timing)]
    changes = []
    for column in dict.fromkeys([*old.columns, *new.columns]):
        if column == "run":  # which record it was read from, named by what it was made with
            continue
        name = f"{about} {column}"
        if column not in old or column not in new:
            there = ("there" if column in table else "-" for table in (old, new))
            changes.append(Change("column", name, *there, timing=timing))
            continue
        moved = [
            (before, after, relative_change(before, after))
            for before, after in zip(old[column].tolist(), new[column].tolist(), strict=True)
            if not _same_cell(before, after, tolerance)
        ]
        if moved:
            before, after, relative = max(moved, key=_size)
            changes.append(
                Change("column", f"{name} ({len(moved)} of {len(old)} rows)", _text(before),
                       _text(after), relative, timing)
            )  # fmt: skip
    return changes


def _same_cell(old: Any, new: Any, tolerance: float) -> bool:
    return (old != old and new != new) or _within(old, new, tolerance)  # an empty cell is a NaN


def _size(moved: tuple[Any, Any, float | None]) -> float:
    """Largest first: what cannot be put in numbers, then the largest change."""
    relative = moved[2]
    return math.inf if relative is None or math.isnan(relative) else abs(relative)


def _compare_context(key: str, old: Any, new: Any, found: Comparison) -> None:
    if not isinstance(old, Mapping | list) and not isinstance(new, Mapping | list):
        old, new = ({} if value is None else {"": value} for value in (old, new))
    for name, before, after in _pairs(old, new):
        if not _within(before, after, 0):
            shown = (v[:12] if "inputs" in key.split() else v for v in map(_text, (before, after)))
            found.context.append(Change(key, name, *shown))
