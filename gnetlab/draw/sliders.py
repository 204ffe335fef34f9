"""Sliders over what a network costs, for JupyterLab; a still figure where nobody can move them.

`cost_sliders()`   image size, width and one module's reductions against multiply-adds per stage
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gnetlab.draw import style

BATCH = "GNETLAB_BATCH"  # set while a report runs: nobody is there to move anything


class CostBars:
    """Multiply-adds per stage and branch beside the paper's own, redrawn in place.

    Only lengths and texts change between two drawings: laying a figure out anew would take longer
    than a hand on a slider waits.
    """

    def __init__(self, reference: pd.DataFrame) -> None:
        self.stages = style.stage_order(list(reference.stage))
        with style.context():
            self.figure = Figure((style.WIDTHS["page"], 2.9), dpi=100)
            self.canvas = FigureCanvasAgg(self.figure)
            self.ax = self.figure.add_axes((0.07, 0.15, 0.9, 0.74))
            before = (reference.groupby("stage").macs.sum() / 1e6).reindex(self.stages)
            self.ax.barh(self.stages, before, height=0.86, facecolor="none", linewidth=0.8,
                         edgecolor=style.QUIET, label="the paper's network")  # fmt: skip
            self.bars = {
                branch: self.ax.barh(self.stages, [0.0] * len(self.stages), color=color, height=0.6,
                                     label=f"{branch} branch" if branch else "no branch")
                for branch, color in style.BRANCH_COLORS.items()
            }  # fmt: skip
            self.ax.set(xlabel="multiply-adds (millions)", ylim=(len(self.stages) - 0.4, -0.6))
            self.ax.legend(loc="lower right", ncols=2)
        self.least = float(before.max())

    def draw(self, costs: pd.DataFrame) -> bytes:
        """A PNG of these costs. Columns: `stage`, `branch`, `macs`, `parameters`."""
        sums = costs.groupby(["branch", "stage"]).macs.sum() / 1e6
        left = pd.Series(0.0, index=self.stages)
        for branch, bars in self.bars.items():
            known = branch in sums.index.get_level_values("branch")
            lengths = sums[branch].reindex(self.stages, fill_value=0) if known else 0 * left
            for bar, start, length in zip(bars, left, lengths, strict=True):
                bar.set(x=start, width=length)
            left += lengths
        self.ax.set_xlim(0, 1.05 * max(left.max(), self.least))
        total = f"{costs.macs.sum() / 1e9:.3f} billion multiply-adds"
        with style.context():
            self.ax.set_title(f"{total}, {costs.parameters.sum() / 1e6:.2f} million parameters")
            buffer = io.BytesIO()
            self.canvas.print_png(buffer)
        return buffer.getvalue()


def cost_sliders(
    costs_of: Callable[..., pd.DataFrame], modules: Mapping[str, Any], *, stage: str = "3b"
) -> Any:
    """Sliders for `side`, `width`, `stage`, `reduce3x3` and `reduce5x5` above a figure of the cost.

    costs_of   called with these five; returns `stage`, `branch`, `macs`, `parameters`
    modules    stage -> widths as the paper has them (`reduce3x3`, `reduce5x5`)
    stage      whose reductions the sliders set first

    In a batch run, where the environment says GNETLAB_BATCH, the figure alone as an image.
    """
    import ipywidgets as widgets
    from IPython.display import Image

    def asked(**changes: Any) -> dict[str, Any]:
        paper = modules[changes.get("stage", stage)]
        own = {"reduce3x3": paper.reduce3x3, "reduce5x5": paper.reduce5x5}
        return {"side": 224, "width": 1.0, "stage": stage, **own, **changes}

    bars = CostBars(costs_of(**asked()))
    first = bars.draw(costs_of(**asked()))
    if os.environ.get(BATCH):
        return Image(first, width=720)
    image = widgets.Image(value=first, format="png", width=720)
    wide = {"description_width": "9em"}
    layout = widgets.Layout(width="34em")
    controls = {
        "side": widgets.IntSlider(224, 32, 512, 16, description="image side (px)"),
        "width": widgets.FloatSlider(value=1.0, min=0.25, max=2.0, step=0.05, description="width"),
        "stage": widgets.Dropdown(options=list(modules), value=stage, description="module"),
        "reduce3x3": widgets.IntSlider(
            asked()["reduce3x3"], 4, 512, 4, description="its 3x3 reduction"
        ),
        "reduce5x5": widgets.IntSlider(
            asked()["reduce5x5"], 4, 256, 4, description="its 5x5 reduction"
        ),
    }

    def redraw(_change: Any = None) -> None:
        values = {name: control.value for name, control in controls.items()}
        image.value = bars.draw(costs_of(**values))

    def to_module(change: Any) -> None:
        for name in ("reduce3x3", "reduce5x5"):
            controls[name].unobserve(redraw, "value")  # one drawing, not three
            controls[name].value = getattr(modules[change["new"]], name)
            controls[name].observe(redraw, "value")

    controls["stage"].observe(to_module, "value")
    for control in controls.values():
        control.style, control.layout = wide, layout
        control.observe(redraw, "value")
    return widgets.VBox([*controls.values(), image])
