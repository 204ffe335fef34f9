"""Imported once by the process that workers are forked from: what most notebooks import.

Loading is all: nothing of it is used in this room.

Nothing in here may use CUDA or start OpenMP's threads; importing these does neither.
"""

import contextlib
import importlib
import warnings

for name in (
    "torch", "torchvision", "pandas", "scipy.stats", "matplotlib.figure", "skimage.data",
    "captum.attr", "fvcore.nn", "gnetlab.measure.costs", "gnetlab.measure.training",
    "gnetlab.draw.figures",
):  # fmt: skip
    # What cannot be imported raises where a notebook wants it, with a better traceback.
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        importlib.import_module(name)
