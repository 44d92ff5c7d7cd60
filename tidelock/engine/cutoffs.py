"""Cut-offs: which ids stay in the draw after top-k, top-p and min-p.

Ids are ranked by partition, never by a full sort of the vocabulary: a nucleus looks at the likeliest few hundred first
and takes more only for the rows whose mass is not reached by them.
"""

from __future__ import annotations

import numpy as np
import torch

FIRST_LOOK = 256  # ids a nucleus ranks at first; then 16 times as many


def cut(
    x: np.ndarray, temperatures: np.ndarray, top_ks: np.ndarray, top_ps: np.ndarray, min_ps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits fp32 [R, V] -> (ids [R, W] ascending, weights fp64 [R, W]); unused places hold weight 0 at the end.

    In this order, each on what the one before it left, renormalised: the k likeliest (0 = all); the fewest of those
    that reach probability p (1 = all); those at least min_p times as likely as the likeliest. Equally likely ids rank
    by id. At least one id stays, and never one of logit -inf. `weights` are exp(x / T - max).
    """
    v = x.shape[1]
    top_ks = np.where((top_ks > 0) & (top_ks < v), top_ks, v)
    top = x.max(axis=1).astype(np.float64) / temperatures
    ranking = (top_ks < v) | (top_ps < 1)
    total = np.full(len(x), np.inf)
    for r in np.flatnonzero(ranking & (top_ks == v)):
        total[r] = np.exp(x[r].astype(np.float64) / temperatures[r] - top[r]).sum()
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, np.int64), np.empty(0))] * len(x)
    rows, m = np.flatnonzero(ranking), min(v, max([FIRST_LOOK, *top_ks[ranking & (top_ks < v)]]))
    while rows.size:
        ids = rank(x[rows], m)
        weights = np.exp(np.take_along_axis(x[rows], ids, 1).astype(np.float64) / temperatures[rows, None] - top[rows, None])
        sums = np.cumsum(weights, axis=1)
        whole = np.where(top_ks[rows] <= m, sums[np.arange(len(rows)), np.minimum(top_ks[rows], m) - 1], total[rows])
        # The probability before an id: below p, it belongs to the nucleus.
        keep = (np.arange(m) < top_ks[rows, None]) & ((sums - weights) / whole[:, None] < top_ps[rows, None])
        enough = (m == v) | ~keep[:, -1] | (top_ks[rows] <= m)
        keep &= weights >= min_ps[rows, None]
        keep &= weights > 0
        keep[:, 0] = True
        for i in np.flatnonzero(enough):
            order = np.argsort(ids[i, keep[i]])
            found[rows[i]] = ids[i, keep[i]][order], weights[i, keep[i]][order]
        rows, m = rows[~enough], min(v, 16 * m)
    for r in np.flatnonzero(~ranking):  # min-p alone needs no ranks
        weights = np.exp(x[r].astype(np.float64) / temperatures[r] - top[r])
        ids = np.flatnonzero((weights >= min_ps[r]) & (weights > 0))
        found[r] = ids, weights[ids]
    return _padded(found)


def rank(x: np.ndarray, m: int) -> np.ndarray:
    """The m likeliest ids of each row [R, V] -> int64 [R, m], likeliest first, equals by id."""
    values, ids = (t.numpy() for t in torch.topk(torch.from_numpy(x), m, dim=1))
    ids = np.take_along_axis(ids, np.lexsort((ids, -values), axis=1), 1)
    # Which of several equals at the edge a partition takes is its own business; ours is that the lower ids come first.
    edge = values[:, -1:]
    for r in np.flatnonzero((x >= edge).sum(axis=1) > m):
        among = np.flatnonzero(x[r] >= edge[r])
        ids[r] = among[np.argsort(-x[r, among], kind="stable")[:m]]
    return ids


def _padded(found: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    width = max([1, *(len(ids) for ids, _ in found)])
    all_ids, all_weights = np.zeros((len(found), width), np.int64), np.zeros((len(found), width))
    for row, (ids, weights) in enumerate(found):
        all_ids[row, : len(ids)], all_weights[row, : len(ids)] = ids, weights
    return all_ids, all_weights
