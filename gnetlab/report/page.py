"""The report's pages: index.html over everything, and each executed notebook as HTML; the PDF.

`write_index()`     index.html from a manifest
`write_notebook()`  an executed notebook beside itself
`print_pdf()`       report.pdf from index.html, by a Chromium or Chrome that is installed

One stylesheet inside every page and nothing from elsewhere: the report opens from disk and can be
sent on as a folder. All text from notebooks, parameters and files is escaped, and each page has a
Content-Security-Policy that forbids every load over the network. No script runs, but for one: the
explorer's own, known by its hash. Scripts that a notebook's cells have put out stay still.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import nbformat
from markupsafe import Markup

from gnetlab.report.manifest import is_disturbed, write
from gnetlab.report.plan import GOOD, title_of

TITLE = "GoogLeNet, measured"
BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)  # fmt: skip
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file: data:; "
    "base-uri 'none'; form-action 'none'"
)
# Class and sign: a state is never told by its colour alone.
_LOOKS = {
    "done": ("good", "✓"), "cached": ("good", "✓"), "cancelled": ("mixed", "–"),
    "supported": ("good", "✓"), "not supported": ("bad", "✗"), "depends": ("mixed", "±"),
    "not measured": ("unknown", "–"),
}  # fmt: skip


class PrintError(RuntimeError):
    """The report could not be printed to PDF; the message says what to try."""


def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("gnetlab.report", "."),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # an older manifest lacks some keys
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "look": lambda state: _LOOKS.get(state, ("bad", "✗"))[0],
        "sign": lambda state: _LOOKS.get(state, ("bad", "✗"))[1],
        "when": _when, "duration": _duration, "plain": _plain, "pairs": _pairs,
    }  # fmt: skip
    templates.globals |= {"policy": _POLICY, "style": _stylesheet(), "href": _href}
    return templates


def _stylesheet() -> Markup:
    text = files("gnetlab.report").joinpath("page.css").read_text(encoding="utf-8")
    return Markup(text)  # ours, not a reader's


def _when(moment: Any) -> str:
    try:
        return (
            f"{datetime.datetime.fromisoformat(moment).astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"
        )
    except (TypeError, ValueError):
        return str(moment or "")


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _plain(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _pairs(values: Any) -> str:
    return ", ".join(f"{name} = {_plain(value)}" for name, value in (values or {}).items())


def _href(*parts: str) -> str:
    # Quoted and relative: a folder's name can never become a scheme or another host.
    return quote("/".join(parts).lstrip("/"))


def write_index(manifest: Mapping[str, Any], output: Path) -> Path:
    """Render `output`/index.html from a manifest.

    A notebook's page is linked where it lies in `output` already. Keys that an older manifest
    lacks are left out.
    """
    notebooks, anchors = [], {}
    for i, entry in enumerate(manifest["notebooks"], 1):
        figures = []
        for j, figure in enumerate(entry.get("figures") or [], 1):
            # Numbers, since two runs of a grid have figures of the same name.
            figures.append({**figure, "id": f"figure-{i}-{j}"})
            anchors[entry["name"], figure["name"]] = f"figure-{i}-{j}"
        stem = entry.get("notebook") or entry["name"]
        pages = [
            {"kind": kind, "path": f"{stem}{suffix}"}
            for kind, suffix in (("Read the notebook", ".html"), (".ipynb", ".ipynb"))
            if entry.get("folder") and (output / entry["folder"] / f"{stem}{suffix}").is_file()
        ]
        notebooks.append({**entry, "id": f"notebook-{i}", "figures": figures, "pages": pages})
    by_name = {entry["name"]: entry for entry in notebooks}
    claims = []
    for claim in manifest["claims"]:
        run = claim.get("run", claim["notebook"])
        claims.append({
            **claim,
            "anchor": anchors.get((run, claim.get("figure"))),
            "grid": by_name.get(run, {}).get("grid"),
        })  # fmt: skip
    page = (
        _templates()
        .get_template("index.html")
        .render(
            title=TITLE,
            manifest=manifest,
            notebooks=notebooks,
            failed=[entry for entry in notebooks if entry["status"] not in GOOD],
            disturbed=[entry for entry in notebooks if is_disturbed(entry)],
            claims=claims,
            verdicts=Counter(claim["verdict"] for claim in claims),
        )
    )
    return _written(output / "index.html", page)


def write_notebook(executed: Path, index: Path | None = None) -> Path:
    """Render an executed notebook beside itself, as a page of its own that links to `index`.

    HTML that cells have put out is shown as it is, with its styles; of its scripts only the
    explorer's runs.
    """
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            about = output.get("data", {}).get("text/plain", "")
            if "image/png" in output.get("data", {}) and not about.startswith("<"):
                output.metadata.setdefault("image/png", {}).setdefault("alt", about)
    # "basic" is the notebook's body alone: the full templates load scripts from the network.
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    # A policy does not stop these: the page would go elsewhere, or look names up.
    body = re.sub(r"<(?=/?(?:meta|base|link)\b)", "&lt;", body, flags=re.IGNORECASE)
    title = title_of(notebook)
    page = (
        _templates()
        .get_template("notebook.html")
        .render(
            title=title or executed.stem,
            titled=bool(title),
            home=quote(Path(os.path.relpath(index, executed.parent)).as_posix()) if index else None,
            site=TITLE,
            body=Markup(body),
            highlight=_highlighting(),
            policy=f"{_POLICY}; script-src {_explorer_script()}",
        )
    )
    return _written(executed.with_suffix(".html"), page)


def _highlighting() -> Markup:
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=s).get_style_defs(".highlight") for s in _STYLES)
    return Markup(f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}")


_STYLES = ("default", "monokai")  # of code, in light and in dark


def _explorer_script() -> str:
    """The source of a policy that lets the explorer's script run: its hash."""
    text = files("gnetlab.draw").joinpath("explorer.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def find_browser() -> str:
    """The path of a Chromium, Chrome or Edge: $GNETLAB_CHROMIUM, or the first of `BROWSERS`.

    Raises PrintError if there is none.
    """
    asked = os.environ.get("GNETLAB_CHROMIUM")
    found = next(filter(None, map(shutil.which, [asked] if asked else BROWSERS)), None)
    if found is None:
        looked = f"GNETLAB_CHROMIUM={asked}" if asked else ", ".join(BROWSERS)
        raise PrintError(
            f"no browser to print with; looked for {looked}. Install Chromium or Chrome, or set "
            "GNETLAB_CHROMIUM to its path, or print index.html from any browser"
        )
    return found


def print_pdf(index: Path, *, timeout: float = 300) -> Path:
    """Print a report's index.html to report.pdf beside it, complete or not at all.

    `timeout` is in seconds. Raises PrintError if there is no browser, or it fails.
    """
    browser = find_browser()
    target = index.with_name("report.pdf")
    part = index.with_name(".part-report.pdf")
    part.unlink(missing_ok=True)
    # Printed without links to files: a PDF would keep where they lie on this machine.
    unlinked = re.sub(
        r'<a href="[^"]*">(<img [^>]*?)( loading="lazy")?></a>', r"\1>",
        index.read_text(encoding="utf-8"),
    )  # fmt: skip
    printed = _written(index.with_name(".part-report.html"), unlinked)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [
            browser, "--headless", "--disable-gpu", "--no-pdf-header-footer", "--no-first-run",
            f"--user-data-dir={folder}", f"--print-to-pdf={part.resolve()}",
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium refuses to start as root with it
        log = Path(folder) / "log.txt"
        problem = ""
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*command, printed.resolve().as_uri()], stdout=said, stderr=said,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                if process.wait(timeout):
                    problem = f"ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                problem = f"took longer than {timeout:g} s"
            finally:
                _end(process)
                printed.unlink()
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    complete = part.is_file() and part.read_bytes().rstrip().endswith(b"%%EOF")
    if problem or not complete:
        part.unlink(missing_ok=True)
        raise PrintError(
            f"{browser} {problem or 'wrote no PDF'}{': ' + lines[-1] if lines else ''}. "
            "Print index.html from a browser instead"
        )
    os.replace(part, target)
    return target


def _end(process: subprocess.Popen) -> None:
    """End a browser with all its processes, if it still runs."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _written(path: Path, text: str) -> Path:
    write(path, text)
    return path
