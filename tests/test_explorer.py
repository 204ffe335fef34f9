"""The explorer in a browser: exported to HTML with the network off, and live in JupyterLab."""

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

import nbformat
import numpy as np
import pytest
import torch
from test_readme import own_port

import gnetlab as gl
from gnetlab.explorer import explore
from gnetlab.net.data import open_image, preprocess
from gnetlab.report.page import write_notebook

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright (pip install playwright)"
)
CHROMIUM = os.environ.get("GNETLAB_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the path, or its path in GNETLAB_CHROMIUM"
)
SLOW = 300_000  # milliseconds: other tests may have the cores
# The quickest redraw of several (ms): on a busy machine other processes come between.
REDRAW = """async (choice) => {
  let least = Infinity;
  for (let i = 0; i < 10; i++) {
    await gnetlab.select({...choice, channel: choice.channel + 1});
    await gnetlab.select(choice);
    least = Math.min(least, gnetlab.lastRedraw);
  }
  return least;
}"""
SIDE, SHARED = 96, "width=0.1, aux=False, num_classes=10, norm='batch', init='kaiming', seed=0"


def network():
    return eval(f"gl.googlenet('paper', {SHARED})", {"gl": gl})


def truth(image):
    """The maps of one picture by a plain recording."""
    model = network().eval()
    with torch.no_grad(), gl.record(model, gl.branch_names(model)) as maps:
        model(preprocess(open_image(image).pixels, SIDE))
    return {name: values[0].numpy() for name, values in maps.items()}


def shown(frame):
    """What the explorer in `frame` has chosen, and the map on its canvas."""
    return frame.evaluate("({...gnetlab.state, ...gnetlab.pixels()})")


def check(frame, maps, **expected):
    """The canvas holds numpy's map of what is chosen, within 1/255 of the map's range."""
    seen = shown(frame)
    assert {key: seen[key] for key in expected} == expected
    branch = "branch_pool" if seen["branch"] == "pool" else f"branch{seen['branch']}"
    known = maps[f"inception{seen['stage']}.{branch}"][seen["channel"]]
    codes = np.array(seen["codes"]).reshape(seen["height"], seen["width"])
    assert codes.shape == known.shape
    span = np.ptp(known) or 1
    assert np.abs(codes / 255 - (known - known.min()) / span).max() <= 1 / 255
    values = np.array(seen["values"]).reshape(known.shape)
    assert np.abs(values - known).max() <= span / 255
    return seen


def until(frame, condition):
    """Wait; Playwright's own waiting needs eval, which the page forbids."""
    deadline = time.monotonic() + SLOW / 1000
    while not frame.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.05)


@pytest.fixture
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=SLOW
        )
        new_context = opened.new_context

        def patient(**options):
            context = new_context(**options)
            context.set_default_timeout(SLOW)
            return context

        opened.new_context = patient
        yield opened
        opened.close()


def notebook(path, source, bundle=None):
    """A notebook of one cell, run or not."""
    cell = nbformat.v4.new_code_cell(source)
    if bundle:
        cell.outputs = [nbformat.v4.new_output("execute_result", bundle, execution_count=1)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)
    return path


def test_an_exported_page_without_a_network(browser, tmp_path):
    bundle = explore(network(), ["cat", "coffee"], size=SIDE)._repr_mimebundle_()
    exported = write_notebook(notebook(tmp_path / "run.ipynb", "gl.explore(...)", bundle))
    context = browser.new_context(offline=True, viewport={"width": 1000, "height": 900})
    page = context.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(exported.as_uri())
    frame = page.wait_for_selector("iframe", timeout=SLOW).content_frame()
    until(frame, "window.gnetlab && gnetlab.readyAfter > 0")
    assert page.locator("img[alt^=cat]").is_hidden()  # the still sheet makes room
    maps = truth("cat")
    first = check(frame, maps, picture=0, stage="4c", branch="1x1")
    liveliest = maps["inception4c.branch1x1"].std((1, 2)).argmax()
    assert first["channel"] == liveliest

    frame.locator("h1").click()  # the keyboard goes where the reader has clicked
    page.keyboard.press("3")
    page.keyboard.press("PageUp")
    check(frame, maps, stage="4b", branch="5x5")
    page.keyboard.press("[")
    frame.locator("#slider").evaluate("e => { e.value = 0; e.dispatchEvent(new Event('input')); }")
    check(frame, maps, stage="4a", branch="5x5", channel=0)
    page.keyboard.press("ArrowRight")
    check(frame, maps, channel=1)
    start = network().inception4a.branch_slices["branch5x5"].start
    assert frame.locator("#concat").input_value() == str(start + 1)
    frame.locator("#concat").fill("2")  # the third of the module: in its first branch
    frame.locator("#concat").press("Enter")
    check(frame, maps, stage="4a", branch="1x1", channel=2)
    frame.locator("#channel").fill("4")
    frame.locator("#channel").press("Enter")
    check(frame, maps, branch="1x1", channel=4)

    frame.get_by_role("button", name="3b", exact=True).click()
    frame.get_by_role("button", name="3x3", exact=True).click()
    order = (-maps["inception3b.branch3x3"].std((1, 2))).argsort(kind="stable")
    box = frame.locator("#grid").bounding_box()
    rows = -(-len(order) // 16)
    frame.locator("#grid").click(
        position={"x": box["width"] * 5.5 / 16, "y": box["height"] * 0.5 / rows}
    )
    check(frame, maps, stage="3b", branch="3x3", channel=order[5])
    page.keyboard.press("ArrowDown")
    check(frame, maps, channel=order[6])

    frame.locator("#channel").fill("1.5")  # no channel: the field has its own again
    frame.locator("#channel").press("Enter")
    assert frame.locator("#channel").input_value() == str(order[6])

    frame.locator("#picture").select_option("coffee")
    until(frame, "gnetlab.state.picture === 1")
    check(frame, truth("coffee"), picture=1, stage="3b", branch="3x3", channel=order[6])
    frame.get_by_role("button", name="Grad-CAM").click()
    assert shown(frame)["view"] == "attribution"
    times = []
    for stage in ("3a", "4c", "5b"):
        for channel in range(4):
            choice = {"picture": 0, "stage": stage, "branch": "1x1", "channel": channel}
            times.append(frame.evaluate(REDRAW, choice | {"view": "overlay"}))
            check(frame, maps, stage=stage, channel=channel)
    assert statistics.median(times) < 16
    with pytest.raises(playwright.Error, match="no branch 9z 1x1; there are 3a 1x1"):
        frame.evaluate("gnetlab.select({stage: '9z'})")
    page.screenshot(path=tmp_path / "exported.png", full_page=True)
    assert not complaints
    assert all(url.startswith(("file:", "data:", "about:", "blob:")) for url in requests)

    page = browser.new_context(offline=True, java_script_enabled=False).new_page()
    page.goto(exported.as_uri())  # a reader without scripts
    assert page.locator("img[alt^=cat]").is_visible()
    empty = page.wait_for_selector("iframe", timeout=SLOW).content_frame()
    assert not empty.locator("#slider").is_visible()  # nothing that would not move


@pytest.mark.parametrize("width", [900, 600])
def test_nothing_overlaps_or_is_cut(browser, tmp_path, width):
    saved = explore(network(), ["cat", "coffee"], size=SIDE, method="gradient_x_activation").save(
        tmp_path / "page.html"
    )
    page = browser.new_context(offline=True, viewport={"width": width, "height": 700}).new_page()
    page.goto(saved.as_uri())
    page.wait_for_function("gnetlab.readyAfter > 0", timeout=SLOW)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    overlapping = """() => {
      const texts = [...document.querySelectorAll("h1,h2,p,button,select,input,dt,dd,li,label,kbd")]
        .filter((e) => e.offsetWidth).map((e) => [e, e.getBoundingClientRect()]);
      const found = [];
      for (const [a, p] of texts) for (const [b, q] of texts)
        if (a !== b && !a.contains(b) && !b.contains(a) && p.left < q.right - 1
            && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
          found.push([a.outerHTML.slice(0, 60), b.outerHTML.slice(0, 60)]);
      return found;
    }"""
    assert page.evaluate(overlapping) == []
    nameless = "[...document.querySelectorAll('input,select,button')].filter(e => !(e.ariaLabel "
    nameless += "|| e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"
    assert page.evaluate(nameless) == []
    reached = set()  # by Tab alone
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
    assert {"picture", "3a", "5b", "pool", "opacity", "slider", "channel", "concat", "sheet"} <= {
        name.strip() for name in reached
    }


@pytest.fixture
def opened(browser, tmp_path):
    """A function that opens a saved explorer, its script having run."""

    def page_of(explorer, width=900):
        saved = explorer.save(tmp_path / "page.html")
        page = browser.new_context(viewport={"width": width, "height": 700}).new_page()
        page.goto(saved.as_uri())
        page.wait_for_function("gnetlab.readyAfter > 0", timeout=SLOW)
        return page

    return page_of


def test_keys_work_on_every_keyboard_and_after_a_slider(opened):
    page = opened(explore(network(), "cat", size=SIDE))
    page.locator("h1").click()
    state = "[gnetlab.state.stage, gnetlab.state.branch]"
    press = """options => document.body.dispatchEvent(
      new KeyboardEvent("keydown", {bubbles: true, ...options}))"""
    page.evaluate(press, {"key": "[", "altKey": True, "ctrlKey": True})  # AltGr
    assert page.evaluate(state) == ["4b", "1x1"]
    page.evaluate(press, {"key": "]", "altKey": True})  # Option
    page.evaluate(press, {"key": "[", "metaKey": True})  # the browser's own
    page.evaluate(press, {"key": "2", "ctrlKey": True})
    assert page.evaluate(state) == ["4c", "1x1"]
    page.locator("#slider").focus()
    page.keyboard.press("2")
    page.keyboard.press("]")
    assert page.evaluate(state) == ["4d", "3x3"]
    order = (-truth("cat")["inception4d.branch3x3"].std((1, 2))).argsort(kind="stable")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("gnetlab.state.channel") == order[1]
    said = page.locator("#slider").get_attribute("aria-valuetext")
    assert said == page.locator("#name").inner_text()
    assert f"channel {order[1]} " in said
    page.locator("#opacity").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#opacity").input_value() == "84"
    assert page.evaluate("gnetlab.state.channel") == order[1]
    page.keyboard.press("4")
    assert page.evaluate(state) == ["4d", "pool"]
    page.locator("#channel").focus()
    page.keyboard.press("1")
    assert page.evaluate(state) == ["4d", "pool"]
    assert page.get_by_role("group", name="liveliest first").get_attribute("id") == "sheet"


def test_the_colour_bar_is_that_of_the_overlay(opened):
    page = opened(explore(network(), "cat", size=SIDE, method="gradient_x_activation"))
    page.evaluate("gnetlab.select({view: 'attribution'})")
    page.wait_for_function("gnetlab.state.view === 'attribution'")
    stops = page.locator("#ramp").evaluate("e => getComputedStyle(e).backgroundImage")
    found = re.findall(r"rgba?\((\d+), (\d+), (\d+)(?:, ([\d.]+))?\) ([\d.]+)%", stops)
    assert len(found) == 17
    for *_, alpha, place in found[9:]:
        assert float(alpha or 1) == pytest.approx(((float(place) - 50) / 50) ** 0.5, abs=0.01)
    assert float(found[0][4]) == 0


@pytest.mark.parametrize("width", [900, 600])
def test_many_modules_and_long_classes_fit(opened, width):
    model = gl.googlenet("cifar", width=0.1, extra_modules=20, aux=False, num_classes=10, seed=0)
    found = explore(model, "cat", size=32)
    picture = found.pictures[0]
    guesses = [(f"American Staffordshire terrier, Staffy ({i})", p)
               for i, (_, p) in enumerate(picture.predictions)]  # fmt: skip
    found.pictures = [picture._replace(predictions=guesses)]
    page = opened(found, width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    lines = """all => all.map((e) => {
      const text = document.createRange();
      text.selectNodeContents(e);
      return text.getClientRects().length;
    })"""
    assert set(page.locator("#guesses span:last-child").evaluate_all(lines)) == {1}


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab over `tmp_path`, with settings of its own."""
    port, token = own_port(), "explorer"
    folders = {
        name: str(tmp_path / ".jupyter" / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                     "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "GNETLAB_BATCH"} | folders
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={tmp_path}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + SLOW / 1000
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (tmp_path / "lab.log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "lab.log").read_text()
                time.sleep(0.2)
        yield f"{address}/lab/tree/look.ipynb?token={token}&reset"
    finally:
        server.terminate()  # it ends its kernels, too
        server.wait(300)


SOURCE = f"""import gnetlab as gl
from gnetlab.explorer import explore
model = gl.googlenet("paper", {SHARED})
explore(model, "cat", size={SIDE})"""


def test_live_in_jupyterlab(browser, lab, tmp_path):
    bundle = explore(network(), "cat", size=SIDE)._repr_mimebundle_()
    notebook(tmp_path / "look.ipynb", SOURCE, bundle)
    page = browser.new_context(viewport={"width": 1250, "height": 1100}).new_page()
    page.goto(lab, timeout=SLOW)
    still = page.locator(".jp-OutputArea img[alt^=cat]")
    still.wait_for(timeout=SLOW)  # opened, not run, so not trusted: the sheet, no frame
    assert page.locator(".jp-OutputArea iframe").count() == 0
    assert still.evaluate("e => e.naturalWidth") == 864
    page.screenshot(path=tmp_path / "untrusted.png")

    # A kernel that is still starting may never see what it is asked to run.
    connected = "shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus"
    page.wait_for_function(f"jupyterapp.{connected} === 'connected'", timeout=SLOW)
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    frame = explorer_frame(page, "explains class")
    before = check(frame, truth("cat"), stage="4c", branch="1x1")
    frame.locator("h1").click()
    page.keyboard.press("2")
    page.keyboard.press("ArrowRight")
    chosen = check(frame, truth("cat"), branch="3x3")
    explained = int(frame.locator("#target").inner_text().split()[-1])
    other = (explained + 1) % 10
    page.screenshot(path=tmp_path / "live.png")

    target = page.get_by_placeholder("as called; or a class by number or name")
    target.fill(str(other))
    target.press("Enter")
    frame = explorer_frame(page, f"explains class {other}")
    seen = check(frame, truth("cat"), stage="4c", branch="3x3", channel=chosen["channel"])
    assert seen["codes"] == chosen["codes"] != before["codes"]

    picture = page.get_by_placeholder("as called; or a photograph's name, or a path")
    picture.fill("/no/such.png")
    picture.press("Enter")
    page.get_by_text("image '/no/such.png': no such file").wait_for(timeout=SLOW)
    assert page.locator(".jp-OutputArea iframe").count() == 1
    check(frame, truth("cat"), channel=chosen["channel"])
    picture.fill("coffee")
    picture.press("Enter")
    frame = explorer_frame(page, "coffee: predicted")
    check(frame, truth("coffee"), stage="4c", branch="3x3")
    page.screenshot(path=tmp_path / "changed.png")


def explorer_frame(page, words):
    """The explorer's frame, as soon as it says `words`."""
    page.frame_locator(".jp-OutputArea iframe").get_by_text(words).first.wait_for(timeout=SLOW)
    frame = page.locator(".jp-OutputArea iframe").element_handle().content_frame()
    frame.wait_for_function("window.gnetlab && gnetlab.readyAfter > 0", timeout=SLOW)
    return frame
