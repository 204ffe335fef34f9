"""The report's pages: index.html over everything, and each executed notebook as HTML.

One stylesheet inside every page, no script, no request to anywhere: the report opens from disk
and can be sent on as a folder. All text from notebooks, parameters and files is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from markupsafe import Markup

TITLE = "GoogLeNet, measured"


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("gnetlab.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _stylesheet() -> Markup:
    text = files("gnetlab.report").joinpath("page.css").read_text(encoding="utf-8")
    return Markup(text)  # ours, not a reader's


def write_index(manifest: Mapping[str, Any], output: Path) -> Path:
    """Render `output`/index.html from a manifest."""
    page = (
        _templates()
        .get_template("index.html")
        .render(title=TITLE, manifest=manifest, style=_stylesheet())
    )
    return _write(output / "index.html", page)


def write_notebook(executed: Path) -> Path:
    """Render an executed notebook beside itself, as a page of its own."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    notebook = nbformat.read(executed, as_version=4)
    # "basic" is the notebook's body alone: the full templates load scripts from the network.
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    page = (
        _templates()
        .get_template("notebook.html")
        .render(
            title=executed.stem,
            body=Markup(body),
            style=_stylesheet(),
            highlight=Markup(HtmlFormatter(style="default").get_style_defs(".highlight")),
        )
    )
    return _write(executed.with_suffix(".html"), page)


def _write(path: Path, text: str) -> Path:
    part = path.with_name(f".part-{path.name}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path
