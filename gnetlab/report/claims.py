"""What the paper claims, the criterion for each, and the verdict on what a notebook measured.

`CLAIMS`   every claim with its source, where it is measured, and a criterion fixed before the run
`check()`  judge a measurement, keep it for the report, and show the row in the notebook
`facts()`  keep what the report's manifest should say of a notebook: weights, device, data
`collect()`  all kept verdicts of a report

A criterion sees only the measured numbers. A verdict is "supported", "not supported", "depends"
(the reason names the condition) or "not measured" (the reason says why).
"""

from __future__ import annotations

import difflib
import html
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
DEPENDS, NOT_MEASURED = "depends", "not measured"
Judgement = tuple[str, str]  # verdict, reason


@dataclass(frozen=True)
class Claim:
    """`needs` are the measured numbers (name: meaning) that `judge` gets."""

    id: str
    text: str
    source: str
    notebook: str
    section: str
    criterion: str
    needs: Mapping[str, str]
    judge: Callable[[Mapping[str, Any]], Judgement]
    judges_nan: bool = False  # else a number that is NaN was not measured


def _depth_22(m: Mapping[str, Any]) -> Judgement:
    close = abs(m["macs"] / 1.5e9 - 1) <= 0.1
    facts = f"{m['layers']} layers, {m['macs'] / 1e9:.3f} G multiply-adds"
    if m["layers"] != 22 or not close:
        return NOT_SUPPORTED, facts
    if m["rows_that_disagree"]:
        rows = ", ".join(m["rows_that_disagree"])
        return DEPENDS, f"{facts}; but Table 1's operations do not add up in: {rows}"
    return SUPPORTED, f"{facts}; every row of Table 1 agrees"


def _vgg_cost(m: Mapping[str, Any]) -> Judgement:
    facts = (
        f"VGG-16 is {m['top1_gain']:+.1f} points (torchvision's weights, whose GoogLeNet is a "
        f"variant) at {m['mac_ratio']:.1f}x the multiply-adds, {m['parameter_ratio']:.1f}x the "
        f"parameters and {m['time_ratio']:.1f}x the time of the paper's network"
    )
    similar = abs(m["top1_gain"]) <= 3
    if not similar or min(m["mac_ratio"], m["parameter_ratio"]) < 5:
        return NOT_SUPPORTED, facts
    if m["time_ratio"] < 5:
        return DEPENDS, f"in multiply-adds and parameters, less so in time on this device: {facts}"
    return SUPPORTED, facts


def _reduction(m: Mapping[str, Any]) -> Judgement:
    facts = (
        f"without reductions the modules cost {m['mac_ratio']:.1f}x as many multiply-adds, and "
        f"the output grows to {m['final_width_ratio']:.1f}x as many channels"
    )
    if m["mac_ratio"] >= 2 and m["width_grows"]:
        return SUPPORTED, facts
    if m["mac_ratio"] >= 2 or m["width_grows"]:
        return DEPENDS, f"only one of cost and width: {facts}"
    return NOT_SUPPORTED, facts


def _quadratic(m: Mapping[str, Any]) -> Judgement:
    facts = (
        f"twice the width is 2^{m['exponent']:.2f} times the multiply-adds, in the modules alone "
        f"2^{m['module_exponent']:.2f}"
    )
    if abs(m["module_exponent"] - 2) > 0.1:
        return NOT_SUPPORTED, facts
    if m["exponent"] < 1.8:
        return DEPENDS, f"in the modules, less so in the whole network: {facts}"
    return SUPPORTED, facts


def _higher_only(m: Mapping[str, Any]) -> Judgement:
    facts = (
        f"Inception from the first layer on stores {m['memory_ratio']:.2f}x the activations and "
        f"takes {m['time_ratio']:.2f}x the time of a training step, at {m['mac_ratio']:.2f}x its "
        "multiply-adds"
    )
    if m["memory_ratio"] >= 1.25:
        return SUPPORTED, facts
    if m["memory_ratio"] >= 1.05:
        return DEPENDS, f"a little: {facts}"
    return NOT_SUPPORTED, facts


def _correlated(m: Mapping[str, Any]) -> Judgement:
    beyond = [
        stage for stage, p in m["p"].items() if p <= 0.01 and m["z"][stage] > m["z_random"][stage]
    ]
    which = f" ({', '.join(beyond)})" if 0 < len(beyond) < len(m["p"]) else ""
    facts = (
        f"channels of one branch correlate more than by chance, and more clearly than in a random "
        f"network, in {len(beyond)} of {len(m['p'])} modules{which}; "
        f"agreement of clusters with branches (adjusted Rand index) at most {m['rand_index']:.2f}"
    )
    if len(beyond) >= 7 * len(m["p"]) / 9:
        return SUPPORTED, facts
    return (DEPENDS if beyond else NOT_SUPPORTED), facts


def _locality(m: Mapping[str, Any]) -> Judgement:
    facts = (
        "rank correlation with height of the share of 3x3 and 5x5: "
        f"{m['channel_trend']:+.2f} for output channels, {m['energy_trend']:+.2f} for energy"
    )
    grows = [m["channel_trend"] >= 0.5, m["energy_trend"] >= 0.5]
    if all(grows):
        return SUPPORTED, facts
    return (DEPENDS if any(grows) else NOT_SUPPORTED), facts


def _aux_gradient(m: Mapping[str, Any]) -> Judgement:
    ratios = {name: ratio for name, ratio in m["ratios"].items() if math.isfinite(ratio)}
    helped = {name: ratio for name, ratio in ratios.items() if ratio >= 2}
    others = [ratio for name, ratio in ratios.items() if name not in helped]
    facts = "; ".join(f"({name}) {ratio:.3g}x" for name, ratio in helped.items()) or "nowhere 2x"
    facts = f"gradient at conv1 with heads over without, at initialization: {facts}"
    if others:
        facts += f"; in {len(others)} other configurations {min(others):.3g}x to {max(others):.3g}x"
    if "escaped_with_heads" in m:
        facts = (
            f"{m['escaped_with_heads']} of {m['seeds']} seeds left the plateau in {m['steps']} "
            f"steps with heads, {m['escaped_without_heads']} of {m['seeds']} without; {facts}"
        )
    if len(ratios) < len(m["ratios"]):
        facts += f"; not finite in {len(m['ratios']) - len(ratios)} configurations, left out"
    if helped and not others:
        return SUPPORTED, facts
    if helped:
        return DEPENDS, f"in {len(helped)} of {len(ratios)} configurations; {facts}"
    return NOT_SUPPORTED, facts


def _interval(difference: Mapping[str, float]) -> str:
    """In percentage points."""
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _aux_regularize(m: Mapping[str, Any]) -> Judgement:
    gap, test = m["gap"], m["test"]
    facts = (
        f"with heads less without, percentage points: gap {_interval(gap)}, test accuracy "
        f"{_interval(test)}, {gap['seeds']} seeds, {m['steps']} steps"
    )
    narrower, worse, better = gap["high"] < 0, test["high"] < 0, test["low"] > 0
    if narrower and not worse:
        return SUPPORTED, facts
    if narrower:
        return DEPENDS, f"the gap narrows, but test accuracy falls: {facts}"
    if better:
        return DEPENDS, f"test accuracy rises, but the gap does not narrow: {facts}"
    return NOT_SUPPORTED, facts


def _sparse_slow(m: Mapping[str, Any]) -> Judgement:
    at_90, at_99 = m["ratios_90"], m["ratios_99"]
    faster_90 = [case for case, ratio in at_90.items() if ratio < 1]
    faster_99 = [case for case, ratio in at_99.items() if ratio < 1]
    facts = "time of CSR over the faster dense form's at 90% and 99% zeros: " + "; ".join(
        f"({case}) {at_90[case]:.3g}x and {ratio:.3g}x" for case, ratio in at_99.items()
    )
    if len(faster_90) == len(at_90):
        return NOT_SUPPORTED, facts
    if not faster_99:
        return SUPPORTED, facts
    where = "everywhere" if len(faster_99) == len(at_99) else f"for ({') and ('.join(faster_99)})"
    also = f"; at 90% already for ({') and ('.join(faster_90)})" if faster_90 else ""
    return DEPENDS, f"CSR is faster at 99% {where}{also}; {facts}"


def _dense_parts(m: Mapping[str, Any]) -> Judgement:
    facts = (
        f"outputs differ by {m['difference']:.1g} of the largest, {m['zero_share']:.0%} of the one "
        f"convolution's weights are zero, and its branches are {m['speedup']:.2g}x as fast as it"
    )
    if m["difference"] > 1e-5 or m["zero_share"] < 0.5:
        return NOT_SUPPORTED, facts
    if m["speedup"] < 1.5:
        return DEPENDS, f"equal and sparse, but hardly faster on this device: {facts}"
    return SUPPORTED, facts


_PAPER = "arXiv 1409.4842"
CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        Claim(
            "depth-22",
            "The network is 22 layers deep, counting layers with parameters, and needs about "
            "1.5 billion multiply-adds at 224 x 224; Table 1 says where.",
            f"{_PAPER}, sections 1 and 5, Table 1",
            "01_compute_cost",
            "Does Table 1 add up?",
            "22 layers, multiply-adds within 10% of 1.5 billion, and every row's operations equal "
            "to the printed number when rounded; depends if only rows differ",
            {
                "layers": "layers with parameters along the deepest path",
                "macs": "multiply-adds of the paper preset at 224 x 224",
                "rows_that_disagree": "rows of Table 1 whose operations differ as printed",
            },
            _depth_22,
        ),
        Claim(
            "vgg-cost",
            "VGG reaches a similar accuracy at many times the compute and parameters.",
            f"{_PAPER}, Table 2 (accuracy); Inception v3, arXiv 1512.00567, section 1 (cost)",
            "01_compute_cost",
            "What does a multiply-add buy?",
            "published top-1 within 3 points, and at least 5x the multiply-adds and parameters; "
            "depends if the measured time is less than 5x",
            {
                "top1_gain": "published top-1 of VGG-16 minus GoogLeNet's, points",
                "mac_ratio": "multiply-adds, VGG-16 over GoogLeNet",
                "parameter_ratio": "parameters, VGG-16 over GoogLeNet",
                "time_ratio": "time per image measured here at batch 1, VGG-16 over GoogLeNet",
            },
            _vgg_cost,
        ),
        Claim(
            "reduction",
            "1x1 reductions make 3x3 and 5x5 convolutions affordable; without them the pool "
            "branch blows the width up stage by stage.",
            f"{_PAPER}, section 4, Figure 2",
            "01_compute_cost",
            "What do the 1x1 reductions save?",
            "without reductions at least 2x the multiply-adds over the nine modules, and a width "
            "that grows from every module to the next; depends if only one holds",
            {
                "mac_ratio": "multiply-adds of the nine modules, naive over reduced",
                "final_width_ratio": "output channels of 5b, naive over reduced",
                "width_grows": "whether the naive width grows from every module to the next",
            },
            _reduction,
        ),
        Claim(
            "quadratic",
            "Widening chained convolutions raises the compute quadratically.",
            f"{_PAPER}, section 3",
            "01_compute_cost",
            "What happens when it grows?",
            "doubling the width raises the modules' multiply-adds by a power of 2 with an exponent "
            "within 0.1 of 2, the whole network's with at least 1.8; depends if only the modules'",
            {
                "exponent": "log2 of the network's multiply-adds at width 2 over width 1",
                "module_exponent": "the same for the nine modules alone",
            },
            _quadratic,
        ),
        Claim(
            "higher-only",
            "Inception belongs in the higher layers; the lower ones stay plain, for memory in "
            "training.",
            f"{_PAPER}, section 4",
            "01_compute_cost",
            "Why does Inception not start at the first layer?",
            "with Inception modules in place of conv1 and conv2 a training step stores at least "
            "1.25x the activations; depends from 1.05x",
            {
                "memory_ratio": "activations kept for the backward pass, Inception stem over plain",
                "time_ratio": "time of a training step measured here, Inception stem over plain",
                "mac_ratio": "multiply-adds of a training step, Inception stem over plain",
            },
            _higher_only,
        ),
        Claim(
            "locality",
            "1x1 units catch local clusters; the share of 3x3 and 5x5 grows with height.",
            f"{_PAPER}, section 4",
            "02_branch_activations",
            "How do the branches share the work?",
            "the share of the 3x3 and 5x5 branches in a module's output channels and in its energy "
            "both rise with height, with a rank correlation of at least 0.5 over the nine modules; "
            "depends if one does",
            {
                "channel_trend": "rank correlation of height and the share of output channels",
                "energy_trend": "rank correlation of height and the share of energy",
            },
            _locality,
        ),
        Claim(
            "correlated",
            "Units of a layer cluster by correlation, and the branches follow the clusters.",
            f"{_PAPER}, section 3, after Arora et al., arXiv 1310.6343",
            "02_branch_activations",
            "Do the branches follow the correlations?",
            "in at least 7 of 9 modules of a trained network channels of one branch correlate more "
            "than permuted ones (p <= 0.01), by more standard deviations than in a random network; "
            "depends if in some",
            {
                "p": "stage -> share of permutations that reach the difference",
                "z": "stage -> the difference in standard deviations of permuted ones",
                "z_random": "stage -> the same for a random network",
                "rand_index": "largest adjusted Rand index of clusters and branches",
            },
            _correlated,
        ),
        Claim(
            "aux-gradient",
            "Auxiliary heads keep gradient alive in the lower layers.",
            f"{_PAPER}, section 5",
            "03_auxiliary_heads",
            "Where does the gradient come from?",
            "at initialization the heads at least double the gradient RMS of conv1 in every "
            "configuration measured; depends if in some of them",
            {"ratios": "configuration -> gradient RMS at conv1, total over main alone"},
            _aux_gradient,
            judges_nan=True,
        ),
        Claim(
            "aux-regularize",
            "Auxiliary heads regularize.",
            f"{_PAPER}, section 5; Inception v3, arXiv 1512.00567, section 4",
            "03_auxiliary_heads",
            "Do they regularize?",
            "at the end of training the gap between accuracy on training and on test images is "
            "narrower with heads (95% interval of the paired difference below 0) and test accuracy "
            "not lower (its interval not below 0); depends if it is lower, or if it rises while "
            "the gap does not narrow",
            {
                "gap": "training less test accuracy, with heads less without: mean, low, high, and "
                "seeds",
                "test": "the same of test accuracy",
                "steps": "length of the trainings",
            },
            _aux_regularize,
        ),
        Claim(
            "sparse-slow",
            "Non-uniform sparse arithmetic wastes today's hardware: even 100x fewer operations "
            "would not pay off.",
            f"{_PAPER}, section 3",
            "04_sparse_vs_dense",
            "Does it pay to compute only what is not zero?",
            "at 99% random zeros (100x fewer operations) CSR, im2col included, is not faster than "
            "the faster of two dense forms (the library's convolution, im2col and a product) in "
            "any stage measured; not supported if it is faster at 90% in every stage; depends in "
            "between",
            {
                "ratios_90": "stage -> time of CSR over the faster dense form's, 90% zeros",
                "ratios_99": "the same time at 99% zeros",
            },
            _sparse_slow,
        ),
        Claim(
            "dense-parts",
            "An Inception module is a filter-level sparse layer built of dense parts.",
            f"{_PAPER}, sections 3 and 4",
            "04_sparse_vs_dense",
            "What does it pay to know where the zeros are?",
            "one 5x5 convolution gives the same output as the three convolutional branches (to "
            "1e-5 of the largest), at least half of its weights are structural zeros, and the "
            "branches are at least 1.5x faster than it; depends if only the time falls short",
            {
                "difference": "largest difference of the outputs over the largest output",
                "zero_share": "share of structural zeros among the weights of the one convolution",
                "speedup": "time of the one 5x5 convolution over that of its branches",
            },
            _dense_parts,
        ),
    )
}


@dataclass(frozen=True)
class Verdict:
    """A judged claim; in a notebook it shows as a table row."""

    id: str
    verdict: str
    reason: str
    measured: Mapping[str, Any]
    figure: str | None
    notebook: str
    text: str
    source: str
    criterion: str

    def _repr_html_(self) -> str:
        cells = {
            "claim": f"{self.text} ({self.source})",
            "criterion": self.criterion,
            "measured": self.reason,
            "verdict": self.verdict,
        }
        rows = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in cells.items())
        return f"<table class='claim'>{rows}</table>"

    def __repr__(self) -> str:
        return f"{self.id}: {self.verdict} ({self.reason})"


def check(
    claim_id: str,
    measured: Mapping[str, Any] | None,
    *,
    directory: str | Path = ".",
    figure: str | None = None,
    reason: str = "",
) -> Verdict:
    """Judge a claim by its criterion and keep the verdict in `directory`/claims.

    claim_id   one of `CLAIMS`, each with its source, its criterion and the numbers that it `needs`
    measured   those numbers by name (more are kept, for the reader); None means not measured, and
               so does a needed one that is NaN, or has nothing in it
    figure     the saved figure's name that shows it
    reason     why it was not measured

    Returns the `Verdict`, whose `verdict` is "supported", "not supported", "depends" or "not
    measured"; in a notebook it shows as a table row. Raises ValueError for an unknown claim, a
    missing number, or None without a reason.

    >>> from gnetlab.report import claims
    >>> claims.CLAIMS["reduction"].needs["mac_ratio"]
    'multiply-adds of the nine modules, naive over reduced'
    >>> measured = {"mac_ratio": 4.2, "final_width_ratio": 3.0, "width_grows": True}
    >>> claims.check("reduction", measured, directory="results").verdict
    'supported'
    >>> claims.check("vgg-cost", None, reason="no network", directory="results")
    vgg-cost: not measured (no network)
    """
    if claim_id not in CLAIMS:
        near = difflib.get_close_matches(str(claim_id), CLAIMS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown claim {claim_id!r}.{hint} Known: {', '.join(CLAIMS)}")
    claim = CLAIMS[claim_id]
    if measured is None:
        if not reason:
            raise ValueError(
                f"claim {claim_id!r}: measured=None needs a reason; give reason=, or the numbers"
            )
        verdict = NOT_MEASURED
    else:
        missing = [f"{name} ({what})" for name, what in claim.needs.items() if name not in measured]
        if missing:
            raise ValueError(
                f"claim {claim_id!r} needs {'; '.join(missing)}; add them to `measured`, or give "
                "None with a reason"
            )
        lacking = [
            f"{name} ({what}) is {lack}"
            for name, what in claim.needs.items()
            if (lack := _lack(measured[name], claim.judges_nan))
        ]
        verdict, reason = (NOT_MEASURED, "; ".join(lacking)) if lacking else claim.judge(measured)
    judged = Verdict(claim_id, verdict, reason, dict(measured or {}), figure, claim.notebook,
                     claim.text, claim.source, claim.criterion)  # fmt: skip
    folder = Path(directory) / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(jsonable(asdict(judged)), indent=1, ensure_ascii=False)
    (folder / f"{claim_id}.json").write_text(text + "\n", encoding="utf-8")
    return judged


def facts(*, directory: str | Path = ".", **values: str | int | float) -> None:
    """Keep facts (weights="...", device="...") for the manifest, with those kept before."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "facts.json"
    if path.is_file():
        values = {**json.loads(path.read_text(encoding="utf-8")), **values}
    text = json.dumps(jsonable(values), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _lack(value: Any, nan_is_fine: bool) -> str:
    """What keeps a measured value from being judged; empty if nothing does."""
    value = value.tolist() if hasattr(value, "tolist") and not hasattr(value, "items") else value
    if hasattr(value, "items"):
        if not len(value):
            return "empty"
        found = ((key, _lack(inner, nan_is_fine)) for key, inner in value.items())
        return next((f"{lack} for {key}" for key, lack in found if lack), "")
    return "NaN" if not nan_is_fine and isinstance(value, float) and math.isnan(value) else ""


def jsonable(value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """`value` as JSON has it: keys are text, and so are NaN and the infinities, which it lacks.

    `other` makes something else of what JSON does not know; by default numpy's numbers are taken.
    """
    if isinstance(value, Mapping):
        return {
            key if key is None or isinstance(key, str | int) else str(key): jsonable(inner, other)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [jsonable(inner, other) for inner in value]
    if isinstance(value, set | frozenset):
        return [jsonable(inner, other) for inner in sorted(value, key=repr)]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(float(value))
    if value is None or isinstance(value, str | int | float):
        return value
    return jsonable((other or _plain)(value), other)


def _plain(value: Any) -> Any:
    """numpy's and pandas' numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be kept with a claim; give a number or text")


def collect(
    directories: Mapping[str, Path | None], cancelled: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Every claim in order: its kept verdict, or "not measured".

    `directories` maps a notebook's name to its output folder, or None if it failed, or is among
    the `cancelled`. A claim whose notebook is not among them, failed, or left no verdict says so.
    """
    rows = []
    for claim in CLAIMS.values():
        folder = directories.get(claim.notebook)
        verdict = Verdict(claim.id, NOT_MEASURED, "", {}, None, claim.notebook, claim.text,
                          claim.source, claim.criterion)  # fmt: skip
        row = asdict(verdict)
        if folder is None:
            happened = "failed" if claim.notebook in directories else "was not run"
            happened = "was cancelled" if claim.notebook in cancelled else happened
            row["reason"] = f"{claim.notebook} {happened}"
            others = [name for name, other in directories.items() if other and _kept(claim, other)]
            if others:  # of a copy, as a rule
                row["reason"] += f"; judged in {', '.join(others)}, which is not its notebook"
        elif not _kept(claim, folder):
            row["reason"] = "the notebook did not get there"
        else:
            try:
                row |= Verdict(**json.loads(_kept(claim, folder).read_text("utf-8"))).__dict__
            except (OSError, ValueError, TypeError):
                row["reason"] = "the verdict that it left cannot be read"
        rows.append(row)
    return rows


def _kept(claim: Claim, folder: Path) -> Path | None:
    """The file of a claim's verdict in a notebook's folder, if there is one."""
    path = folder / "claims" / f"{claim.id}.json"
    return path if path.is_file() else None
