"""GoogLeNet, measured. The public names; each is loaded when it is first used."""

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
