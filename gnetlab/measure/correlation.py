"""Do the units of a layer cluster by correlation, and do the branches follow the clusters?

`branch_correlation()`  correlation of channels within and between branches, against chance

Section 3 of the paper takes from Arora et al. 2013 (arXiv 1310.6343) that a layer's units should
be grouped by the correlation of what they put out; a branch is such a group, built in beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from torch import Tensor

from gnetlab.measure.activations import Moments, add_moments, streamed
from gnetlab.net.model import GoogLeNet, Inception, check_ours

_FOUND = ("within", "between", "difference", "z", "p", "rand_index", "largest_cluster")


def branch_correlation(
    model: GoogLeNet,
    batches: Tensor | Iterable[Tensor],
    *,
    permutations: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation of the channels of every Inception module, one row per module.

    model         gnetlab's
    batches       images, N x C x H x W each; correlations are over images and positions
    permutations  of the channels among the branches, for what chance alone would give; drawn
                  from `seed`

    Columns: `module`, `stage`, `channels` (that vary at all), `within`, `between` (mean absolute
    correlation of two channels of the same branch, of different ones), `difference`, `z` (of the
    difference, in standard deviations of the permuted ones), `p` (share of permutations, itself
    included, that reach it), `rand_index` (adjusted, of as many clusters as branches by complete
    linkage, against the branches: 1 is equal, 0 is chance), `largest_cluster` (its share of the
    channels), `values` (per channel). A module with fewer than two channels that vary in two
    branches or more has NaN.

    The pool branch repeats what its input has, whatever the weights: compare with a random network.
    The model runs in eval mode. Raises ValueError for a network that is not gnetlab's, and for no
    batches.

    Source of the idea: section 3 of the paper, after Arora et al. 2013, arXiv 1310.6343.

    >>> import gnetlab as gl
    >>> from gnetlab.net.data import load
    >>> images, labels = load("photocrops").train_batch(0, batch_size=8)
    >>> model = gl.googlenet("cifar", width=0.125, seed=0)
    >>> frame = gl.branch_correlation(model, images, permutations=20)
    >>> frame.stage.tolist()
    ['3a', '3b', '4a', '4b', '4c', '4d', '4e', '5a', '5b']
    >>> bool(frame.p.between(1 / 21, 1).all())  # of 20 permutations and itself
    True
    """
    check_ours(model)
    modules = {n: m for n, m in model.named_children() if isinstance(m, Inception)}
    moments = streamed(model, modules, batches, add_moments)
    random = np.random.default_rng(seed)
    rows = []
    for name, module in modules.items():
        correlation, varies = _correlation(moments[name])
        branch = np.concatenate(
            [[i] * (s.stop - s.start) for i, s in enumerate(module.branch_slices.values())]
        )[varies]
        row = {
            "module": name,
            "stage": name.removeprefix("inception"),
            "channels": int(varies.sum()),
            **dict.fromkeys(_FOUND, np.nan),
            "values": moments[name].count,
        }
        counts = np.bincount(branch)
        if (counts > 0).sum() > 1 and counts.max() > 1:
            row |= _against_chance(np.abs(correlation), branch, permutations, random)
            clusters = _clusters(correlation, len(set(branch)))
            row["rand_index"] = _rand_index(clusters, branch)
            row["largest_cluster"] = np.bincount(clusters).max() / len(clusters)
        rows.append(row)
    return pd.DataFrame(rows)


def _correlation(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Matrix over the channels that vary, and which those are."""
    covariance = moments.covariance().cpu().numpy()
    variance = np.diag(covariance)
    # What float32 rounds a constant to does not vary.
    squares = (moments.products.diagonal() / moments.count).cpu().numpy()
    varies = variance > 1e-6 * squares
    deviation = np.sqrt(variance[varies])
    return (covariance[np.ix_(varies, varies)] / np.outer(deviation, deviation)), varies


def _against_chance(
    strength: np.ndarray, branch: np.ndarray, permutations: int, random: np.random.Generator
) -> dict[str, float]:
    """Within and between branches, and how unusual the difference is."""
    groups = np.eye(branch.max() + 1)[branch]  # channel x branch
    size = groups.sum(0)
    pairs_within = (size * (size - 1)).sum()
    pairs_between = size.sum() ** 2 - (size**2).sum()
    off_diagonal = strength - np.diag(np.diag(strength))
    whole = off_diagonal.sum()

    def means(members: np.ndarray) -> tuple[float, float]:
        inside = np.einsum("ib,ij,jb->", members, off_diagonal, members, optimize=True)
        return inside / pairs_within, (whole - inside) / pairs_between

    within, between = means(groups)
    chance = np.array(
        [np.subtract(*means(random.permutation(groups))) for _ in range(permutations)]
    )
    difference = within - between
    return {
        "within": within,
        "between": between,
        "difference": difference,
        "z": (difference - chance.mean()) / chance.std(),
        "p": (1 + (chance >= difference).sum()) / (1 + permutations),
    }


def _clusters(correlation: np.ndarray, count: int) -> np.ndarray:
    """Of which cluster each channel is: any two of one are alike, which keeps the sizes balanced.

    Average linkage would put nearly all channels into one.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    distance = np.clip(1 - np.abs(correlation), 0, None)
    np.fill_diagonal(distance, 0)
    return fcluster(linkage(squareform(distance, checks=False), "complete"), count, "maxclust")


def _rand_index(clusters: np.ndarray, branch: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985): pairs that both put together, over chance."""
    table = pd.crosstab(clusters, branch).to_numpy().astype(float)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    rows, columns = pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / pairs(np.array([table.sum()]))
    largest = (rows + columns) / 2
    return (pairs(table) - expected) / (largest - expected) if largest != expected else 0.0
