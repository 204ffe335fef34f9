"""What a report will run: notebooks, checked parameters, and jobs.

`find_notebooks()`  the notebooks by name, or all of them
`plan()`            jobs with checked parameters, or one `ReportError` with every problem
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import yaml

import gnetlab


class ReportError(Exception):
    """What was asked cannot be run; nothing was."""


GOOD = ("done", "cached")


@dataclass
class Job:
    """A notebook to execute.

    name        names its folder; differs from `notebook` where a grid runs it several times
    status      queued, running; done, cached (nothing it depends on has changed); failed (a cell
                raised, or never ran), timeout, died (its kernel), cancelled; invalid (the file is
                not a notebook of ours, and was not run)
    reason      why it was run, or was not
    parameters  set for this run; `defaults`: what the notebook has for the others
    grid        those of the parameters that differ between the runs of this notebook
    alone       it measures times, and nothing may run beside it: `metadata.gnetlab.alone`
    other_load  share of the cores that other processes took meanwhile, 0 to 1
    expected    seconds that it took the last time
    key         what its result depends on: see `cache`
    """

    name: str
    source: Path
    title: str
    parameters: dict[str, Any]
    cells: int
    status: str = "queued"
    cell: int = 0
    seconds: float = 0.0
    error: str = ""
    folder: Path | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    peak_bytes: int | None = None
    other_load: float | None = None
    alone: bool = False
    started: str | None = None
    expected: float | None = None
    key: dict[str, Any] = field(default_factory=dict)

    @property
    def notebook(self) -> str:
        return self.source.stem


@dataclass(frozen=True)
class _Inspected:
    defaults: dict[str, Any]
    title: str
    cells: int
    alone: bool


def notebooks_folder() -> Path:
    """./notebooks, else the folder beside the installed source."""
    beside = Path(gnetlab.__file__).resolve().parent.parent / "notebooks"
    for folder in (Path("notebooks"), beside):
        if any(folder.glob("*.ipynb")):
            return folder.resolve()
    raise ReportError(
        f"no notebooks found in ./notebooks or {beside}; run from a clone of the repository, or "
        "give paths of notebooks"
    )


def find_notebooks(names: list[str]) -> list[Path]:
    """Notebooks by path, name or beginning of a name ("02"); all of them for an empty list."""
    paths = [Path(name).resolve() for name in names if name.endswith(".ipynb")]
    missing = [str(path) for path in paths if not path.is_file()]
    rest = [name for name in names if not name.endswith(".ipynb")]
    if rest or not names:
        known = {path.stem: path for path in sorted(notebooks_folder().glob("*.ipynb"))}
        if not names:
            return list(known.values())
        for name in rest:
            begin = [path for stem, path in known.items() if stem.startswith(name)]
            found = [known[name]] if name in known else begin
            paths += found
            if not found:
                missing.append(f"{name} (known: {', '.join(known)})")
    if missing:
        raise ReportError(f"no such notebook: {'; '.join(missing)}")
    return list(dict.fromkeys(paths))


def plan(
    notebooks: list[Path],
    parameters: Mapping[str, str | Sequence[str]],
    common: Mapping[str, Any],
) -> list[Job]:
    """Check everything before anything runs; one ReportError lists every problem.

    `parameters` come from the command line as text: each must exist in at least one notebook's
    cell tagged "parameters", and fit the type of its default there; a notebook gets those it has.
    Several values make a grid: a notebook runs once per combination of those that it has.
    `common` (profile, device) must exist in all of them.

    A file that is no notebook, or not one of ours, becomes an "invalid" job: it is not run, and
    the others are.
    """
    problems: list[str] = []
    found: dict[Path, _Inspected | str] = {path: _inspected(path, common) for path in notebooks}
    for stem in {path.stem for path in notebooks}:
        alike = [str(path) for path in notebooks if path.stem == stem]
        if len(alike) > 1:
            problems.append(f"{' and '.join(alike)} would share one folder; rename one")
    good = {path: about for path, about in found.items() if isinstance(about, _Inspected)}
    everywhere = sorted({n for about in good.values() for n in about.defaults} - {"output_dir"})
    for name in parameters:
        if good and name not in everywhere:
            near = difflib.get_close_matches(name, everywhere, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            problems.append(f"unknown parameter {name}.{hint} Known: {', '.join(everywhere)}")
    jobs = []
    for path, about in found.items():
        if isinstance(about, str):
            invalid = Job(path.stem, path, path.stem, {}, 0, status="invalid", error=about)
            invalid.reason = "not a notebook that can be run"
            jobs.append(invalid)
            continue
        values: dict[str, list[Any]] = {}
        for name, texts in parameters.items():
            if name in about.defaults:
                texts = [texts] if isinstance(texts, str) else texts
                try:
                    values[name] = [_typed(name, text, about.defaults[name]) for text in texts]
                except ReportError as error:
                    problems.append(f"{path.name}: {error}")
        jobs += _combinations(path, about, values, common)
    if problems:
        raise ReportError("\n".join(dict.fromkeys(problems)))
    return jobs


def _combinations(
    path: Path, about: _Inspected, values: Mapping[str, list[Any]], common: Mapping[str, Any]
) -> list[Job]:
    jobs = {}
    for combination in product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        grid = {name: value for name, value in chosen.items() if len(values[name]) > 1}
        parameters = {**common, **chosen}
        defaults = {
            name: value
            for name, value in about.defaults.items()
            if name not in parameters and name != "output_dir"
        }
        job = Job(_folder_name(path.stem, grid), path, about.title, parameters, about.cells,
                  defaults=defaults, grid=grid, alone=about.alone)  # fmt: skip
        jobs[job.name] = job  # the same value twice is one run
    return list(jobs.values())


def _folder_name(stem: str, grid: Mapping[str, Any]) -> str:
    """`03_auxiliary_heads@seed=1,gain=0.6`; what no file's name should hold becomes a hash."""
    if not grid:
        return stem
    text = ",".join(f"{name}={value}" for name, value in grid.items())
    plain = re.sub(r"[^\w.=,+-]+", "-", text)
    if plain != text or len(plain) > 80:
        plain = f"{plain[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{stem}@{plain}"


def _inspected(path: Path, common: Mapping[str, Any]) -> _Inspected | str:
    """What a notebook says of itself, or why it cannot be run."""
    try:
        notebook = nbformat.read(path, as_version=4)
        kernel = notebook.metadata.get("kernelspec", {})
        if not kernel.get("name"):
            return f"{path.name} names no kernel; open it in JupyterLab and save it once"
        written_in = notebook.metadata.get("language_info", {}).get("name", "python")
        language = kernel.get("language", written_in)
        if language != "python":
            return f"{path.name} is a notebook in {language}; only Python's can be run"
        tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        if len(tagged) != 1:
            return (
                f"{path.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one. "
                "In JupyterLab: the cell's property inspector, Cell tags"
            )
        defaults = _defaults(tagged[0].source)
        title = title_of(notebook) or path.stem
        alone = bool(notebook.metadata.get("gnetlab", {}).get("alone"))
    except SyntaxError as error:
        return f"{path.name}: its parameters cell cannot be read as Python: {error}"
    except Exception as error:  # nbformat raises many kinds
        return f"{path} is not a notebook: {str(error)[:200]}"
    lacking = [name for name in (*common, "output_dir") if name not in defaults]
    if lacking:
        return f"{path.name}: its parameters cell lacks {', '.join(lacking)}; give them defaults"
    return _Inspected(defaults, title, len(notebook.cells), alone)


def title_of(notebook: nbformat.NotebookNode) -> str:
    """A notebook's first heading, "" if it has none; a comment in a fenced block is none."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"^(```|~~~).*?(^\1|\Z)", "", cell.source, flags=re.M | re.S)
            if found := re.search(r"^# (.+)$", text, re.M):
                return found[1]
    return ""


class _Expression(str):
    """The source of a default that is no literal: any value fits."""


def _defaults(source: str) -> dict[str, Any]:
    """What the parameters cell assigns to names."""
    defaults = {}
    for statement in ast.parse(re.sub(r"^[%!].*", "", source, flags=re.M)).body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value:
            targets = [statement.target]
        else:
            continue
        try:
            value = ast.literal_eval(statement.value)
        except (ValueError, TypeError):
            value = _Expression(ast.unparse(statement.value))
        defaults |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return defaults


def split_values(text: str) -> list[str]:
    """The values of a grid's parameter: separated by commas, those within brackets aside.

    >>> split_values("xavier,kaiming"), split_values("[3a,4e],[5b]")
    (['xavier', 'kaiming'], ['[3a,4e]', '[5b]'])
    """
    return [value.strip() for value in re.split(r",(?![^\[]*\])", text)]


def named_path(text: str) -> tuple[str, str]:
    """What a parameter says before a path, and the path: ("folder:", "mine"), or (text, "").

    Only a path at which something is counts; the longest, since names may hold a colon.
    """
    starts = [0, *(found.end() for found in re.finditer(":", text))]
    for kind, path in ((text[:start], text[start:]) for start in starts):
        if path and os.path.exists(os.path.expanduser(path)):
            return kind, path
    return text, ""


def _absolute(text: str) -> str:
    """With the path that it names, if it does; "cat" is a photograph, "./cat" a path."""
    kind, path = named_path(text)
    if path and (kind or os.sep in path or Path(path).suffix):
        return f"{kind}{Path(os.path.expanduser(path)).resolve()}"
    return text


def _typed(name: str, text: str, default: Any) -> Any:
    """The value that a text of the command line is, of its default's type."""
    if isinstance(default, str) and not isinstance(default, _Expression):
        # Notebooks run in folders of their own: what is a file here must stay one there.
        return _absolute(text)
    if type(default) in (int, float):  # YAML has other numbers: 1e-3 is a text there, and 010 is 8
        try:
            return type(default)(text)
        except ValueError:
            raise _wrong(name, text, default) from None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if default is None or isinstance(default, _Expression):
        if isinstance(value, str):
            return float(value) if _EXPONENTIAL.fullmatch(value) else _absolute(value)
        return value
    if isinstance(default, tuple) and isinstance(value, str):
        value = yaml.safe_load(f"[{text.strip().strip('()')}]")
    # papermill makes texts of tuples, so a list is given for one
    if type(value) is not (list if isinstance(default, tuple) else type(default)):
        raise _wrong(name, text, default)
    kinds = {type(inner) for inner in default} if isinstance(value, list) else set()
    if kinds and kinds <= {int, float}:
        try:
            numbers = [float(inner) if isinstance(inner, str) else inner for inner in value]
        except ValueError:
            raise _wrong(name, text, default) from None
        return [float(n) if type(n) is int and kinds == {float} else n for n in numbers]
    return value


_EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML wants a point and a sign


def _wrong(name: str, text: str, default: Any) -> ReportError:
    return ReportError(
        f"parameter {name} takes {type(default).__name__} (default {default!r}), "
        f"but {text!r} was given{'; several values need --grid' if ',' in text else ''}"
    )
