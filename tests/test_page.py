"""The report's pages: what they say, that nothing runs in them or asks the network, their looks."""

import http.server
import itertools
import os
import re
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from PIL import Image

from gnetlab.report import page

CHROMIUM = os.environ.get("GNETLAB_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the path, or its path in GNETLAB_CHROMIUM"
)
SLOW = 300_000  # milliseconds: other tests may have the cores
EVIL = "\"'><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
# Waits until every image is there, or throws. (Playwright's own waiting needs eval.)
LOADED = """Promise.all([...document.images].map(
    (image) => { image.loading = "eager"; return image.decode(); }))"""
RUNS = ("01_costs", "03_heads@init=xavier,seed=1", "03_heads@init=he,seed=1", "04_broken")


def figure(folder, name, alt="A figure", **more):
    """Saved files of a figure, and its entry of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / f"{name}.png")
    for kind in ("svg", "csv"):
        (folder / f"{name}.{kind}").write_text("x\n1\n")
    files = {k: {"path": f"{name}.{k}", "sha256": "ab" * 32} for k in ("png", "svg", "csv")}
    entry = {"name": name, "alt": alt, "data": 'a from "1" to <2>', "pixels": [40, 30]}
    return entry | {"timing": False, "files": files} | more


def executed(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = cells or [nbformat.v4.new_markdown_cell("# A notebook")]
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return path


def manifest(root, evil=""):
    """A schema 2 manifest of a grid, a failure and a plain run, with its files in `root`."""
    notebooks = []
    for name in RUNS:
        broken = name == "04_broken"
        folder = f"failed/{name}" if broken else name
        page.write_notebook(executed(root / folder / f"{name}.ipynb"), root / "index.html")
        grid = {"init": name.split("=")[1] + evil} if "@" in name else {}
        notebooks.append({
            "name": name, "notebook": name.split("@")[0], "title": f"Title of {name}{evil}",
            "status": "failed" if broken else "done", "reason": f"a reason{evil}",
            "error": f"ValueError: wrong{evil}\nsecond line" if broken else "",
            "started": "2026-01-02T03:04:05+00:00", "seconds": 250.4, "peak_bytes": 2_100_000_000,
            "other_load": 0.25 if name == RUNS[0] else 0.07,
            "parameters": {"seed": 1, f"text{evil}": f"long {'x' * 200}{evil}"}, "grid": grid,
            "facts": {f"device{evil}": f"CPU{evil}"}, "inputs": {f"model.py{evil}": "cd" * 32},
            "folder": folder,
            "figures": [] if broken else [
                figure(root / folder, "line", f"A line{evil}"),
                figure(root / folder, "clock", "Times", timing=True),
            ],
        })  # fmt: skip
    claims = [
        {"id": i, "verdict": verdict, "reason": f"numbers{evil}", "measured": {}, "figure": shown,
         "notebook": "x", "text": f"Claim {i}{evil}", "source": f"paper{evil}",
         "criterion": f"more{evil}", "run": run}
        for i, verdict, shown, run in (
            ("one", "supported", "line", RUNS[0]), ("two", "depends", "line", RUNS[1]),
            ("two", "not supported", "line", RUNS[2]), ("three", "not measured", None, None),
        )
    ]  # fmt: skip
    return {
        "schema": 2, "command": f"gnetlab report{evil}", "started": "2026-01-02T03:04:05+00:00",
        "seconds": 61.0, "gnetlab": "0.1", "git": {"commit": "0123456789abcdef", "dirty": True},
        "python": "3.12", "packages": {"torch": "2.99", f"pkg{evil}": f"1{evil}"},
        "system": {"os": f"Linux{evil}", "machine": "x86_64", "cpu": f"Fast CPU{evil}",
                   "simd": f"avx2{evil}", "cores": 2,
                   "memory_bytes": 8e9, "gpus": [{"name": f"Big GPU{evil}", "driver": "550.1"}]},
        "notebooks": notebooks, "claims": claims,
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    (root / "manifest.json").write_text("{}")
    page.write_index(manifest(root), root)
    return root


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright (pip install playwright)"
    )
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the path, or its path in GNETLAB_CHROMIUM")
    with sync_api.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=SLOW
        )
        yield opened
        opened.close()


@pytest.fixture
def opened(browser):
    """A function that opens a page; what it has asked for is in `.asked`."""
    contexts = []

    def open_page(path, offline=True, **options):
        contexts.append(browser.new_context(offline=offline, **options))
        contexts[-1].set_default_timeout(SLOW)
        shown = contexts[-1].new_page()
        shown.asked = []
        shown.on("request", lambda request: shown.asked.append(request.url))
        shown.goto(Path(path).as_uri())
        return shown

    yield open_page
    for context in contexts:
        context.close()


def test_the_index_says_what_when_and_where(report):
    text = re.sub(r"<[^>]+>|\s+", " ", (report / "index.html").read_text())
    text = re.sub(r" +", " ", text)
    for words in (
        "3 of 4 notebooks done", "1 of 4 notebooks not done",
        "04_broken failed : ValueError: wrong",
        "2026-01-02 03:04 UTC", "Fast CPU with avx2, 2 cores, 8.0 GB memory",
        "Big GPU (driver 550.1)",
        "notebooks of commit 0123456789 with changes", "torch 2.99",
        "4 verdicts: 1 supported, 1 depends",
        "took 4 min 10 s", "peak memory 2.1 GB", "timing: differs from run to run", "init = xavier",
        "cd" * 32, "second line", "other processes took 7% of the cores, started",
        "Measured on a busy machine: other processes took 25% of the cores while 01_costs ran.",
    ):  # fmt: skip
        assert words in text, words
    assert text.index("not done") < text.index("What the paper claims")


def test_a_manifest_of_the_first_schema_is_shown(tmp_path):
    old = manifest(tmp_path)
    for key in ("system", "seconds", "git"):
        del old[key]
    old |= {"schema": 1, "platform": "Linux x86_64", "git": None}
    for entry in old["notebooks"]:
        for key in ("notebook", "grid", "inputs", "started", "peak_bytes", "other_load", "facts",
                    "reason"):  # fmt: skip
            del entry[key]
        for drawn in entry["figures"]:
            del drawn["timing"]
    for claim in old["claims"]:
        del claim["run"]
        claim["notebook"] = RUNS[0]
    html = page.write_index(old, tmp_path).read_text()
    assert "Linux x86_64" in html
    assert html.count('href="#figure-1-1"') == 3


def test_a_claim_leads_to_the_figure_of_its_own_run(report):
    html = (report / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    led = re.findall(r'href="#([^"]+)"', body)
    sources = [re.search(f'id="{i}".*?src="([^"]+)"', html, re.DOTALL)[1] for i in led]
    assert [unquote(s) for s in sources] == [f"{run}/line.png" for run in RUNS[:3]]


@pytest.mark.parametrize("name", ["index.html", *(f"{run}/{run}.html" for run in RUNS[:2])])
def test_every_link_leads_somewhere(name, report):
    html = (report / name).read_text()
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    links = re.findall(r'(?:href|src)="([^"]+)"', html)
    assert len(links) > 2
    for link in links:
        parts = urlsplit(link)
        if parts.scheme == "data":
            continue
        assert not parts.scheme, link
        assert not parts.netloc, link
        if parts.path:
            assert (report / name).parent.joinpath(unquote(parts.path)).is_file(), link
        else:
            assert parts.fragment in ids, link
    if name == "index.html":
        assert f"{RUNS[0]}/{RUNS[0]}.html" in links
        assert f"failed/{RUNS[3]}/{RUNS[3]}.html" in links


def test_headings_and_table_are_sound(report):
    html = (report / "index.html").read_text()
    levels = [int(level) for level in re.findall(r"<h([1-6])", html)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert '<html lang="en">' in html
    assert html.count("<main") == html.count("<nav") == html.count("<header") == 1
    assert html.index('class="skip" href="#main"') < html.index("<header")
    assert all("scope=" in cell for cell in re.findall(r"<th\b[^>]*>", html))
    images = re.findall(r"<img[^>]*>", html)
    assert all('alt="' in image for image in images)
    assert 'alt="A line. a from &#34;1&#34; to &lt;2&gt;"' in images[0]
    for verdict, sign in (("supported", "✓"), ("not supported", "✗"), ("depends", "±")):
        assert f'<span aria-hidden="true">{sign}</span> {verdict}</td>' in html


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_have_enough_contrast(dark):
    light_rules, dark_rules = re.findall(r":root \{(.*?)\}", page._stylesheet(), re.DOTALL)[:2]
    rules = dark_rules if dark else light_rules
    colors = dict(re.findall(r"--([\w-]+): (#\w+)", rules))
    colors = {
        k: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:]) for k, c in colors.items()
    }
    grounds = {colors.pop(name) for name in ("paper", "soft")}
    colors.pop("line")
    assert {"ink", "quiet", "good", "bad", "mixed", "unknown", "link", "ansi-red"} <= set(colors)
    from pygments.styles import get_style_by_name

    for token, style in get_style_by_name(page._STYLES[dark]):
        if style["color"] and not style["bgcolor"] and "Whitespace" not in str(token):
            colors[str(token)] = f"#{style['color']}"
    low = {(n, g) for n, c in colors.items() for g in grounds if contrast(c, g) < 4.5}
    assert low == set()


def hostile_notebook(path, address):
    """A notebook that would run scripts and load from `address` wherever it can."""
    loads = (
        f"<img src={address}/1><script src={address}/2></script><script>hacked = 3</script>"
        f"<iframe src={address}/4></iframe><link rel=stylesheet href={address}/5>"
        f'<meta http-equiv="refresh" content="0;url={address}/6"><base href={address}/>'
        f"<style>@import url({address}/7); body {{ background: url({address}/8) }}</style>"
        f"<video src={address}/9 poster={address}/10></video><object data={address}/11></object>"
        f'<img src=x onerror="window.hacked = 12"><link rel=preload as=image href={address}/13>'
        f"<iframe srcdoc=\"&lt;script>parent.hacked = 14; fetch('{address}/14')&lt;/script>"
        f'&lt;img src={address}/15>&lt;meta http-equiv=refresh content=0;url={address}/16>">'
        f"</iframe><svg onload='window.hacked = 17'><image href={address}/18 /></svg>"
    )
    new = nbformat.v4
    outputs = [
        new.new_output("display_data", {"text/html": loads, "text/plain": "x"}),
        new.new_output("display_data", {"application/javascript": "window.hacked = 20"}),
        new.new_output("stream", text=f"printed {EVIL}"),
        new.new_output(
            "error", ename="E", evalue=EVIL, traceback=[f"\x1b[31mraised\x1b[0m {EVIL}"]
        ),
    ]
    code = new.new_code_cell(f"x = 1  # {EVIL}", outputs=outputs, execution_count=1)
    return executed(path, new.new_markdown_cell(f"# Title {EVIL}\n\n$x^2$\n\n{loads}"), code)


@pytest.fixture
def server():
    """The address of a server here, and what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"window.hacked = 'from the network'")

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()


def test_nothing_in_a_hostile_manifest_runs(opened, tmp_path):
    hostile = manifest(tmp_path, EVIL)
    name = "a'><b onclick=x>"
    (tmp_path / name).mkdir()
    drawn = figure(tmp_path / name, 'it\'s "q" & <i>', EVIL)
    hostile["notebooks"].append(hostile["notebooks"][0] | {"name": name, "folder": name,
                                                           "figures": [drawn]})  # fmt: skip
    hostile["notebooks"][1]["status"] = hostile["claims"][0]["verdict"] = EVIL
    hostile["claims"][1]["id"] = hostile["claims"][2]["id"] = EVIL
    shown = opened(page.write_index(hostile, tmp_path), offline=False)
    shown.wait_for_timeout(200)
    assert shown.evaluate("window.hacked") is None
    assert shown.locator("script, main i, [onclick], img[src=x]").count() == 0
    shown.evaluate(LOADED)
    assert all(unquote(url).startswith((f"file://{tmp_path}/", "data:")) for url in shown.asked)


def test_no_script_of_a_notebook_runs_and_no_network_is_asked(opened, server, tmp_path):
    address, asked = server
    path = page.write_notebook(hostile_notebook(tmp_path / "run.ipynb", address))
    shown = opened(path, offline=False)
    shown.wait_for_timeout(1000)
    assert shown.url == path.as_uri()
    assert asked == []
    assert shown.evaluate("window.hacked") is None
    text = shown.inner_text("main")
    for words in ("printed \"'><script>", "raised \"'><script>", "x = 1  # \"'><script>", "$x^2$"):
        assert words in text, words
    shown.evaluate(f"fetch('{address}/last').catch(() => 0)")
    assert asked == []  # the policy holds for what a script would do, too


@needs_chromium
def test_the_server_would_have_noticed(opened, server, tmp_path):
    address, asked = server
    path = page.write_notebook(hostile_notebook(tmp_path / "run.ipynb", address))
    open_to_all = re.sub(r'<meta http-equiv="Content-Sec[^>]+>', "", path.read_text())
    path.write_text(open_to_all.replace("&lt;meta http-equiv=", "<!--"))
    shown, limit = opened(path, offline=False), time.monotonic() + SLOW / 1000
    while len(asked) <= 5:
        assert time.monotonic() < limit, asked
        shown.wait_for_timeout(100)


def test_the_index_asks_for_its_own_files_alone(opened, report):
    shown = opened(report / "index.html")
    shown.evaluate(LOADED)
    assert len(shown.asked) > 6
    assert all(url.startswith((report.as_uri(), "data:")) for url in shown.asked)


@pytest.fixture(scope="module")
def wide(report):
    """A notebook with everything that could stick out."""
    new, outputs = nbformat.v4, []
    cells = "".join(f"<td>column number {i}</td>" for i in range(40))
    outputs.append(new.new_output("display_data", {"text/html": f"<table><tr>{cells}</table>"}))
    outputs.append(new.new_output("stream", text="long" * 200))
    traceback = ["\x1b[1;31mE\x1b[0m: \x1b[32mgreen\x1b[0m"]
    outputs.append(new.new_output("error", ename="E", evalue="x", traceback=traceback))
    code = new.new_code_cell("value = 'long' + 1  # " + "why " * 100, outputs=outputs)
    path = executed(report / "wide" / "wide.ipynb", new.new_markdown_cell("plain $x$"), code)
    return page.write_notebook(path, report / "index.html")


@pytest.mark.parametrize("name", ["index.html", "wide/wide.html"])
def test_a_phone_does_not_scroll_sideways(name, opened, report, wide):  # noqa: ARG001
    shown = opened(report / name, viewport={"width": 375, "height": 700})
    assert shown.evaluate("document.documentElement.scrollWidth") == 375


# Text whose colour is too near to that of the ground it stands on.
FAINT = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const lum = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => { const v = c[i] / 255;
    return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }, 0);
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.getClientRects().length) continue;
    let ground = e;
    while (ground && (rgb(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0)
      ground = ground.parentElement;
    const back = ground ? rgb(getComputedStyle(ground).backgroundColor) : [255, 255, 255];
    const [a, b] = [lum(rgb(getComputedStyle(e).color)), lum(back)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(node.data.trim().slice(0, 40));
  }
  return found; }"""
GROUND = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
INK = GROUND.replace("backgroundColor", "color")


@pytest.mark.parametrize("name", ["index.html", "wide/wide.html"])
def test_light_dark_and_print(name, opened, report, wide):  # noqa: ARG001
    for scheme, media, is_dark in (
        ("light", "screen", False), ("dark", "screen", True), ("dark", "print", False),
    ):  # fmt: skip
        shown = opened(report / name, color_scheme=scheme)
        shown.emulate_media(media=media, color_scheme=scheme)
        ground, ink = sum(shown.evaluate(GROUND)), sum(shown.evaluate(INK))
        assert (ground < 150) == is_dark, (scheme, media)
        assert (ink > 600) == is_dark, (scheme, media)
        assert shown.evaluate(FAINT) == [], (scheme, media)
        links = shown.locator(".files, .notebook nav")
        assert all(link.is_visible() == (media == "screen") for link in links.all())


def test_the_keyboard_finds_everything_and_shows_where_it_is(opened, report):
    shown = opened(report / "index.html")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    assert shown.locator(".skip").bounding_box()["x"] >= 0
    assert shown.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    shown.keyboard.press("Enter")
    assert shown.evaluate("document.activeElement.id") == "main"


def test_a_notebook_leads_back_and_has_a_title_and_descriptions(report, tmp_path):
    failed = f"failed/{RUNS[3]}/{RUNS[3]}.html"
    assert 'href="../../index.html"' in (report / failed).read_text()
    assert 'href="../index.html"' in (report / RUNS[0] / f"{RUNS[0]}.html").read_text()
    assert "<title>A notebook – " in (report / failed).read_text()
    bundle = {"image/png": "iVBORw0KGgo=", "text/plain": "figure line: a <b>line</b>"}
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [nbformat.v4.new_output("display_data", bundle)]
    html = page.write_notebook(executed(tmp_path / "no title.ipynb", cell)).read_text()
    assert 'alt="figure line: a &lt;b&gt;line&lt;/b&gt;"' in html
    assert "<h1>no title</h1>" in html
    assert "index.html" not in html


@needs_chromium
def test_printing_to_pdf(report):
    made = page.print_pdf(report / "index.html")
    assert made == report / "report.pdf"
    content = made.read_bytes()
    assert content.startswith(b"%PDF")
    assert content.rstrip().endswith(b"%%EOF")
    assert b"file://" not in content  # nothing of where it was made
    assert not list(report.glob(".part-*"))


def test_no_browser_is_a_clear_error(report, monkeypatch):
    monkeypatch.delenv("GNETLAB_CHROMIUM", raising=False)
    monkeypatch.setattr(page, "BROWSERS", ("no-such-browser",))
    with pytest.raises(page.PrintError, match=r"looked for no-such-browser.*any browser"):
        page.print_pdf(report / "index.html")


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("echo it is broken >&2; exit 3", "ended with 3: it is broken"),
        ("exit 0", "wrote no PDF"),
        ('printf "%%PDF half" > "$pdf"', "wrote no PDF"),
        ('printf "%%PDF half" > "$pdf"; sleep 60', "took longer than 0.5 s"),
    ],
)
def test_half_a_pdf_is_never_left(does, message, tmp_path, monkeypatch):
    browser = tmp_path / "browser"
    found = "for a; do case $a in --print-to-pdf=*) pdf=${a#*=};; esac; done"
    browser.write_text(f"#!/bin/sh\n{found}\n{does}\n")
    browser.chmod(0o755)
    monkeypatch.setenv("GNETLAB_CHROMIUM", str(browser))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("")
    (tmp_path / "report" / "report.pdf").write_text("the last one")
    with pytest.raises(page.PrintError, match=message):
        page.print_pdf(tmp_path / "report" / "index.html", timeout=0.5 if "sleep" in does else 60)
    assert (tmp_path / "report" / "report.pdf").read_text() == "the last one"
    assert len(list((tmp_path / "report").iterdir())) == 2
