"""GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842), measured.

The network    googlenet, PRESETS, TABLE_1, branch_names, fuse
Images         photographs
Costs          layer_costs, roofline, measure_latency
Feature maps   record, branch_statistics, branch_correlation, receptive_fields, explore
Decisions      branch_attribution, branch_ablation, visualize_channel, channel_selectivity
Training       gradient_flow, train, study

`help(gnetlab.NAME)` shows arguments, columns, errors and an example. Each name is loaded when it is
first used. More is in `gnetlab.net`, `gnetlab.measure`, `gnetlab.draw` and `gnetlab.report`;
`gnetlab --help` is the command line.

>>> import gnetlab as gl
>>> costs = gl.layer_costs(gl.googlenet("paper", aux=False))
>>> int(costs.macs.sum()), int(costs.parameters.sum())
(1582671872, 6998552)
"""

import importlib

_HOME = {
    "googlenet": "net.model",
    "branch_names": "net.model",
    "fuse": "net.fuse",
    "PRESETS": "net.architecture",
    "TABLE_1": "net.architecture",
    "photographs": "net.data",
    "record": "measure.hooks",
    "layer_costs": "measure.costs",
    "roofline": "measure.roofline",
    "measure_latency": "measure.latency",
    "branch_statistics": "measure.activations",
    "branch_attribution": "measure.attribution",
    "visualize_channel": "measure.visualize",
    "channel_selectivity": "measure.specialization",
    "branch_ablation": "measure.ablation",
    "branch_correlation": "measure.correlation",
    "receptive_fields": "measure.receptive",
    "explore": "explorer",
    "gradient_flow": "measure.gradients",
    "train": "measure.loop",
    "study": "measure.training",
}
__version__ = "0.1.0"
__all__ = [*_HOME]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"gnetlab has no {name!r}; it has {', '.join(_HOME)}")


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
