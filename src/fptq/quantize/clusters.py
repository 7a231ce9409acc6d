"""Clusters of channels with a common asymmetric scale (RPTQ, arXiv 2304.01089)."""

from __future__ import annotations

import numpy as np

from fptq import numerics
from fptq.checkpoint import ChannelSteps

_ROUNDS = 50


def cluster_channels(low: np.ndarray, high: np.ndarray, clusters: int) -> np.ndarray:
    """Return the cluster number of each channel [k]: k-means over the points (min x, max x).

    The first centers are the channels at even ranks of max - min, so that the same input gives the same clusters.
    """
    points = np.stack([low, high], axis=1).astype(np.float64)
    ranks = np.linspace(0, len(points) - 1, min(clusters, len(points))).round().astype(int)
    centers = points[np.argsort(high - low, kind="stable")[ranks]]
    members = np.zeros(len(points), np.int64)
    for _ in range(_ROUNDS):
        nearest = np.square(points[:, None] - centers).sum(-1).argmin(1)
        if np.array_equal(nearest, members):
            break
        members = nearest
        for number in np.unique(members):
            centers[number] = points[members == number].mean(0)
    return members


def cluster_steps(low: np.ndarray, high: np.ndarray, clusters: int) -> ChannelSteps:
    """Return the step size and zero point of each channel, the same within a cluster: its smallest to largest value.

    Zero is always within the range, and a code stands for it exactly.
    """
    members = cluster_channels(low, high, clusters)
    lowest, highest = numerics.integer_range(numerics.ACTIVATION_BITS)
    scale, zero = np.ones(len(low), np.float32), np.zeros(len(low), np.float32)
    for number in np.unique(members):
        inside = members == number
        bottom, top = min(0.0, float(low[inside].min())), max(0.0, float(high[inside].max()))
        step = (top - bottom) / (highest - lowest)
        if step > 0:
            scale[inside] = step
            zero[inside] = np.clip(round(lowest - bottom / step), lowest, highest)
    return ChannelSteps(scale, zero)
