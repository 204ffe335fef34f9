"""An executed notebook: whether it is complete, and without what differs from run to run."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import nbformat

from gnetlab.report.manifest import without_home, write

_LONGEST_STREAM = 1_000_000  # characters of what a cell prints that are kept
# What a run leaves that the next one would not: addresses, temporary files, random names.
_VARYING = (
    (re.compile(r"(?<= at )0x[0-9a-f]{6,16}\b"), "0x…"),
    (re.compile(r"(/[\w./-]*)?/ipykernel_\d+/\d+\.py"), "cell.py"),
)
_STYLER = re.compile(r"\bT_[0-9a-f]{5}(?=[\"_ #,{])")
_STYLED = re.compile(r'\bid="(T_[0-9a-f]{5})"')


def unfinished(executed: Path) -> str:
    """Why an executed notebook is not complete; empty if it is."""
    cells = [c for c in nbformat.read(executed, as_version=4).cells if c.cell_type == "code"]
    for number, cell in enumerate(cells, 1):
        raised = next((out for out in cell.outputs if out.output_type == "error"), None)
        if raised:
            return f"{raised.ename}: {raised.evalue} (in code cell {number})"
        skipped = "skip-execution" in cell.metadata.get("tags", [])
        if cell.source.strip() and cell.execution_count is None and not skipped:
            return f"code cell {number} never ran (the kernel ended before it)"
    return ""


def normalize(executed: Path, source: Path | None = None) -> None:
    """Make two runs that did the same the same file; drop what tells of this machine.

    Cells that have no id in `source`, if it is given, were given a random one: it gets a number.
    """
    notebook = nbformat.read(executed, as_version=4)
    written = json.loads(source.read_text(encoding="utf-8")) if source else notebook
    ids = {cell.get("id") for cell in written.get("cells", [])}
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    names = _of_styled_tables(notebook)
    for number, cell in enumerate(notebook.cells):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        tags = cell.metadata.get("tags", [])
        if "papermill-error-cell-tag" in tags:
            cell.metadata["tags"] = ["error"]
        if "injected-parameters" in tags:
            cell["id"] = "injected-parameters"
        elif "error" in cell.metadata.get("tags", []):
            cell["id"] = f"error-{number}"
        elif cell.get("id") not in ids:
            cell["id"] = f"cell-{number}"
        if "outputs" in cell:
            cell.outputs = _joined_streams(cell.outputs)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = shortened(_steady(output.text, names))
            elif output.output_type == "error":
                output.traceback = [shortened(_steady(line, names)) for line in output.traceback]
                output.evalue = shortened(_steady(output.evalue, names))
            else:
                for kind, value in output.data.items():
                    if kind.startswith("text/") and isinstance(value, str):
                        output.data[kind] = _steady(value, names)
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
    write(executed, without_home(nbformat.writes(notebook)) + "\n")


def _of_styled_tables(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The names that pandas gives to its styled tables, which are random, and steady ones."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    html = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    return {name: f"T_{i:05d}" for i, name in enumerate(dict.fromkeys(_STYLED.findall(html)))}


def _joined_streams(outputs: list) -> list:
    """What was printed between two other outputs as one text, warnings after it as another.

    A kernel sends what is printed in pieces when its time has come, and the two in any order.
    """
    joined: list = []
    for is_stream, group in itertools.groupby(outputs, lambda out: out.output_type == "stream"):
        if not is_stream:
            joined += group
            continue
        streams: dict[str, nbformat.NotebookNode] = {}
        for output in group:
            first = streams.setdefault(output.name, output)
            if first is not output:
                first.text += output.text
        joined += sorted(streams.values(), key=lambda out: out.name == "stderr")
    return joined


def _steady(text: str, names: dict[str, str]) -> str:
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return _STYLER.sub(lambda found: names.get(found[0], found[0]), text)


def shortened(text: str, longest: int = _LONGEST_STREAM) -> str:
    """`text` without its middle, if it is longer than that."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"
