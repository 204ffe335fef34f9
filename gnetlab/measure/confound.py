"""Is it the kernel or the width? Small networks that differ in one of the two, trained.

`branch_confound()`      how far the third branch stands out in selectivity, by kernel and widths
`confound_effects()`     what the kernel and what the width does, with intervals over seeds

The 5x5 branch has the largest kernel and nearly the fewest channels: what is found in it may be due
to either (Voss et al. 2021, https://distill.pub/2020/circuits/branch-specialization, name this).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from gnetlab.measure.loop import train
from gnetlab.measure.specialization import PROPERTIES, channel_selectivity, outputs
from gnetlab.net.architecture import MODULES, Architecture, Widths, architecture
from gnetlab.net.model import build
from gnetlab.net.weights import calibrate_batch_norm

KERNELS = ("5x5", "3x3", "3x3+3x3")
LAYOUTS = ("paper", "equal")


@functools.cache
def equal_widths() -> dict[str, Widths]:
    """Table 1 with every module's output shared out equally among its four branches.

    A module's output width stays, and its multiply-adds (with a 5x5) do up to rounding: 3x3 and
    5x5 get the same reduction, as wide as that allows. Both have then as many inputs and outputs.

    >>> equal_widths()["3a"]
    Widths(conv1x1=64, reduce3x3=54, conv3x3=64, reduce5x5=54, conv5x5=64, pool_proj=64)
    """
    inputs, result = 192, {}
    for stage, old in MODULES.items():
        whole = sum(outputs(old).values())
        part = whole // 4
        direct = old.conv1x1 + old.reduce3x3 + old.reduce5x5 + old.pool_proj
        macs = inputs * direct + 9 * old.reduce3x3 * old.conv3x3 + 25 * old.reduce5x5 * old.conv5x5
        reduced = round((macs - 2 * inputs * part) / (2 * inputs + (9 + 25) * part))
        result[stage] = Widths(part, reduced, part, reduced, part, part)
        inputs = whole
    return result


@dataclasses.dataclass(frozen=True)
class _EqualArchitecture(Architecture):
    """An architecture whose modules have the widths of `equal_widths`."""

    def module_widths(self, stage: str) -> Widths:
        return Widths(*(self.channels(count) for count in equal_widths()[stage]))


def _variant(kernel: str, layout: str, width: float, classes: int) -> Architecture:
    arch = architecture(
        "paper", norm="batch", stem="compact", heads=(), dropout=0.0, branch5x5=kernel,
        width=width, num_classes=classes,
    )  # fmt: skip
    return arch if layout == "paper" else _EqualArchitecture(**dataclasses.asdict(arch))


def branch_confound(
    data: Any,
    *,
    seeds: Iterable[int],
    steps: int,
    kernels: Sequence[str] = KERNELS,
    layouts: Sequence[str] = LAYOUTS,
    stages: Sequence[str] = ("3a", "3b", "4a"),
    width: float = 0.25,
    size: int = 64,
    **options: Any,
) -> pd.DataFrame:
    """How far the third branch stands out, by its kernel and by its share of the channels.

    data      a data set of `gnetlab.net.data` with 3 channels; its device is used
    kernels   of the third branch: "5x5", "3x3", "3x3+3x3"
    layouts   "paper": Table 1's widths; "equal": those of `equal_widths`
    stages    modules that count: by default the three that `PUBLISHED` is about
    width     of the networks (compact stem, batch norm, no heads); size: see `channel_selectivity`
    options   for `gnetlab.measure.loop.train`

    Each network is looked at before training (batch norm set from a batch) and after it. The seed
    decides weights and batches, so that variants of one seed see the same pictures.

    Columns: `kernel`, `layout`, `seed`, `trained` (False: before), `property`, `advantage` (mean
    over channels of the third branch minus the mean of the other three branches' means, averaged
    over `stages`; NA where a branch has no channel that counts), `accuracy` (on the test images; NA
    before training), `parameters`, `share` (of the modules' channels that are the third branch's).

    One or two seeds and some dozens of steps show that it runs and no more: for a verdict take at
    least 5 seeds, and steps until the accuracy stands. Raises ValueError for unknown names.
    """
    for what, asked, known in (
        ("kernels", kernels, KERNELS), ("layouts", layouts, LAYOUTS), ("stages", stages, MODULES),
    ):  # fmt: skip
        wrong = [name for name in asked if name not in known]
        if wrong or not asked:
            raise ValueError(f"{what}={asked!r} asked; choose from {', '.join(known)}")
    seeds = list(seeds)
    if not seeds:
        raise ValueError("no seeds asked; give at least one, and 5 or more for a verdict")
    rows = []
    for seed, kernel, layout in product(seeds, kernels, layouts):
        arch = _variant(kernel, layout, width, len(data.classes))
        model = build(arch, init="kaiming", seed=seed).to(data.device)
        channels = [outputs(arch.module_widths(stage)) for stage in stages]
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "share": sum(o["5x5"] for o in channels) / sum(sum(o.values()) for o in channels),
        }
        calibrate_batch_norm(model, data.train_batch(0, 64, seed)[0])
        for trained in (False, True):
            facts["accuracy"] = np.nan
            if trained:
                metrics = train(model, data, steps=steps, seed=seed, **options)
                facts["accuracy"] = metrics.accuracy.iloc[-1]
            selectivity = channel_selectivity(model, size=size)
            key = {"kernel": kernel, "layout": layout, "seed": seed, "trained": trained}
            for name, advantage in _advantages(selectivity, stages):
                rows.append({**key, "property": name, "advantage": advantage, **facts})
    columns = ["kernel", "layout", "seed", "trained", "property", "advantage"]
    return pd.DataFrame(rows)[[*columns, "accuracy", "parameters", "share"]]


def _advantages(selectivity: pd.DataFrame, stages: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in PROPERTIES:
        means = selectivity.groupby(["stage", "branch"])[name].mean().unstack().loc[list(stages)]
        others = means.drop(columns="5x5").mean(axis=1, skipna=False)
        yield name, float((means["5x5"] - others).mean(skipna=False))


def confound_effects(confound: pd.DataFrame) -> pd.DataFrame:
    """What the kernel does at fixed widths and the width at a fixed kernel, over seeds.

    confound   as `branch_confound` gives it

    Differences of `advantage` within a seed. Columns: `factor` ("kernel", "width"), `contrast` (as
    "5x5 - 3x3"; for the width "paper - equal widths": the small branch minus the large one), `at`
    (what is held fixed), `trained`, `property`, `effect` (mean over seeds), `low`, `high` (its 95%
    interval by Student's t; NA for a single seed), `seeds` (count). If the kernel makes the
    difference, the interval of "5x5 - 3x3" lies above 0 after training and not before; if the
    small branch does, that of "paper - equal widths". Raises ValueError if there is no contrast.
    """
    from scipy.stats import t

    table = confound.pivot(
        index=["trained", "property", "seed"], columns=["kernel", "layout"], values="advantage"
    )
    kernels, layouts = (dict.fromkeys(confound[key]) for key in ("kernel", "layout"))
    contrasts = [
        ("kernel", f"{kernel} - 3x3", f"{layout} widths", (kernel, layout), ("3x3", layout))
        for kernel, layout in product(kernels, layouts)
        if kernel != "3x3" and "3x3" in kernels
    ]
    if set(LAYOUTS) <= set(layouts):
        contrasts += [
            ("width", "paper - equal widths", kernel, (kernel, "paper"), (kernel, "equal"))
            for kernel in kernels
        ]
    if not contrasts:
        raise ValueError(
            f"effects of kernel and width asked, but only {', '.join(kernels)} with "
            f"{', '.join(layouts)} widths was measured; run two kernels, 3x3 among them, or both "
            "layouts"
        )
    rows = []
    for factor, contrast, at, one, other in contrasts:
        differences = table[one] - table[other]
        for trained, name in product((False, True), PROPERTIES):
            values = differences.loc[trained, name].dropna()
            count, mean = len(values), values.mean()
            reach = t.ppf(0.975, count - 1) * values.sem() if count > 1 else np.nan
            rows.append(
                {
                    "factor": factor, "contrast": contrast, "at": at, "trained": trained,
                    "property": name, "effect": mean, "low": mean - reach, "high": mean + reach,
                    "seeds": count,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)
