"""What other tools print for the same network, and which terms make the difference.

`explain()`           what a tool prints for a network, term by term, without running the tool
`TOOLS`               the tools, and what each of them adds up
`beside_fvcore()`     fvcore's own count beside ours, module by module, the difference explained
`second_opinions()`   multiply-adds by fvcore and by torch's FlopCounterMode

Tools disagree because each counts something else, not because any of them is wrong: with its terms
every total is an exact integer. The rules hold for networks of convolutions in eval mode.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from gnetlab.measure.costs import layer_costs
from gnetlab.measure.hooks import in_mode


class Term(NamedTuple):
    """`factor` times the sum of `column` over the layers of some operations.

    Operations are given by their beginnings; `where` is "modules", "functions" or "" for both.
    """

    text: str
    factor: int
    column: str
    operations: tuple[str, ...] = ("",)
    where: str = ""


_MACS = Term("multiply-adds", 1, "macs")
_TWICE = Term("multiplications and additions", 2, "macs")
_BIAS = Term("biases", 1, "bias_additions")
_NORM = Term("batch norm, 2 per output", 2, "activations", ("batch_norm",))
_POOLS = ("max_pool", "avg_pool", "adaptive")
_LRN = (
    Term("LRN, 3 per output", 3, "activations", ("local_response_norm",)),
    Term("LRN, its padded input", 1, "padded", ("local_response_norm",)),
)
TOOLS: dict[str, tuple[Term, ...]] = {
    "fvcore": (
        _MACS, _NORM, Term("adaptive pooling, inputs", 1, "inputs", ("adaptive",)),
    ),
    "FlopCounterMode": (_TWICE,),
    "ptflops, aten": (_MACS, _BIAS),
    "ptflops, pytorch": (
        _MACS, _BIAS, _NORM,
        Term("nn.ReLU, counted twice", 2, "activations", ("relu",), "modules"),
        Term("functional ReLU", 1, "activations", ("relu",), "functions"),
        Term("ReLU6", 1, "activations", ("hardtanh",)),
        Term("pooling modules' inputs, counted twice", 2, "inputs", _POOLS, "modules"),
        Term("functional pooling's inputs", 1, "inputs", _POOLS, "functions"),
        *_LRN,
    ),
    "thop": (
        _MACS,
        Term("batch norm, 4 per output", 4, "activations", ("batch_norm",), "modules"),
        Term("adaptive pooling, inputs", 1, "inputs", ("adaptive",), "modules"),
        Term("average pooling, outputs", 1, "activations", ("adaptive", "avg_pool"), "modules"),
    ),
    "torchinfo": (
        _MACS, _BIAS, Term("batch norm, its parameters", 2, "channels", ("batch_norm",)),
    ),
    "torchprofile": (
        _MACS, Term("batch norm, 1 per output", 1, "activations", ("batch_norm",)),
        Term("average pooling, outputs", 1, "activations", ("adaptive", "avg_pool")),
        _LRN[0],
    ),
    "calflops": (
        _TWICE, Term("convolutions' biases", 1, "bias_additions", ("conv",)), _NORM,
        Term("ReLU", 1, "activations", ("relu",)),
        Term("pooling, inputs", 1, "inputs", _POOLS),
        *_LRN,
    ),
}  # fmt: skip


def explain(costs: pd.DataFrame, tool: str | None = None) -> pd.DataFrame:
    """What a tool (None: every one of `TOOLS`) prints for a network, term by term.

    `costs` as from `layer_costs` in eval mode. Columns: `tool`, `term`, `operations` (count, terms
    of zero left out). The sum over a tool's terms is what it prints; torchinfo at batch size 1.

    Raises ValueError for an unknown tool, or for costs with layers that were not counted.

    >>> import gnetlab as gl
    >>> fvcore = explain(gl.layer_costs(gl.googlenet("torchvision")), "fvcore")
    >>> dict(zip(fvcore.term.str.split(",").str[0], fvcore.operations))
    {'multiply-adds': 1498376192, 'batch norm': 6452320, 'adaptive pooling': 50176}
    """
    if tool is not None and tool not in TOOLS:
        near = difflib.get_close_matches(tool, TOOLS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no rule for the tool {tool!r}.{hint} Known: {'; '.join(TOOLS)}")
    if costs.macs.isna().any():
        layer = costs.module[costs.macs.isna()].iloc[0]
        raise ValueError(
            f"layer {layer!r} was not counted, so no tool's total can be explained; leave its row "
            "out of the frame"
        )
    outputs = costs.output_shape
    channels = outputs.map(lambda shape: shape[0] if shape else 0)
    norm_size = (costs.elementwise // costs.activations - 5).where(
        costs.operation == "local_response_norm", 1
    )
    costs = costs.assign(
        inputs=costs.input_bytes // costs.attrs.get("itemsize", 4),
        channels=channels,
        padded=costs.activations + (norm_size - 1) * (costs.activations // channels.clip(lower=1)),
    )
    is_module = costs.kind.str[0].str.isupper()
    rows = []
    for name, terms in TOOLS.items():
        for term in terms if tool in (None, name) else ():
            chosen = costs.operation.str.startswith(term.operations)
            if term.where:
                chosen &= is_module == (term.where == "modules")
            operations = term.factor * int(costs[term.column][chosen].sum())
            if operations:
                rows.append({"tool": name, "term": term.text, "operations": operations})
    return pd.DataFrame(rows, columns=["tool", "term", "operations"])


def _image(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    """One image of zeros on the model's device, in its precision."""
    first = next(model.parameters())
    return torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)


def _fvcore(model: nn.Module, input_size: tuple[int, ...]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore uses what torch calls deprecated
        from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, _image(model, input_size)).unsupported_ops_warnings(False)
    return analysis.uncalled_modules_warnings(False)


def beside_fvcore(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224)) -> pd.DataFrame:
    """fvcore's own count beside ours, per child of the model, and what makes the difference.

    Columns: `module`, `macs`, `fvcore` (its "flop"), `batch_norm`, `adaptive_pool` (fvcore's terms
    for these, by our count), `unexplained` (what then remains). fvcore really runs the network, in
    eval mode, on the model's device and in its precision. Functions that the model itself calls
    have one row, under its class name.
    """
    with in_mode(model, training=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _fvcore(model, input_size).by_module()
    theirs[""] -= sum(theirs[child] for child, _ in model.named_children())  # fvcore has the total
    costs = layer_costs(model, input_size)
    top = costs.module.str.partition(".")[0]
    rows = []
    for name in dict.fromkeys(top):
        of_module = costs[top == name]
        terms = explain(of_module, "fvcore").set_index("term").operations
        macs, norm = (int(terms.get(term.text, 0)) for term in (_MACS, _NORM))
        pool = int(terms.sum()) - macs - norm
        rows.append(
            {
                "module": name or type(model).__name__,
                "macs": macs,
                "fvcore": int(theirs[name]),
                "batch_norm": norm,
                "adaptive_pool": pool,
                "unexplained": int(theirs[name]) - macs - norm - pool,
            }
        )
    return pd.DataFrame(rows)


def second_opinions(
    models: Mapping[str, nn.Module], input_size: tuple[int, ...] = (3, 224, 224)
) -> pd.DataFrame:
    """MACs of convolutions and linear layers by three counters, one row per model.

    Columns: `model`, `gnetlab`, `fvcore` (its "flop" is a MAC), `torch` (FlopCounterMode, halved).
    The other two really run the network, in eval mode, on the model's device and in its precision.
    """
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    for name, model in models.items():
        with in_mode(model, training=False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fvcore = _fvcore(model, input_size).by_operator()
            with FlopCounterMode(display=False) as counter:
                model(_image(model, input_size))
        rows.append(
            {
                "model": name,
                "gnetlab": int(layer_costs(model, input_size).macs.sum()),
                "fvcore": int(fvcore["conv"] + fvcore["linear"]),
                "torch": counter.get_total_flops() // 2,
            }
        )
    return pd.DataFrame(rows)
