"""Scores of one model on each sample, and the metrics that follow from them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MeanScores", "RatioScores", "ResampledScores", "Scores", "clustered", "tied"]


class Scores(ABC):
    """Scores of one model on each sample, and the metric that follows from them."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        """The metric over chosen samples.

        Args:
            index: Sample numbers, shape (..., samples).

        Returns:
            Shape (...).
        """

    @property
    @abstractmethod
    def entries(self) -> Sequence[Any]:
        """What there is of each sample, by which two models' scores of it are told to be the same."""

    @property
    def num_samples(self) -> int:
        """The number of samples, also where `len` counts clusters of them."""
        return len(self)

    @property
    def is_share(self) -> bool:
        """Whether the metric is the share of samples that are right."""
        return False

    @property
    def extremes(self) -> tuple[float, float] | None:
        """The lowest and the highest score of a sample; `None` for a metric that is no mean of them."""
        return None

    @cached_property
    def total(self) -> float:
        """The metric over all samples."""
        return float(self.value(np.arange(len(self))))


class MeanScores(Scores):
    """A metric that is the mean of one number per sample, such as accuracy."""

    def __init__(self, values: Sequence[float] | NDArray[Any]) -> None:
        self.values = np.asarray(values, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.values)

    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        return self.values[index].mean(-1)

    @property
    def entries(self) -> Sequence[float]:
        return self.values.tolist()

    @property
    def extremes(self) -> tuple[float, float] | None:
        return (float(self.values.min()), float(self.values.max())) if len(self) else None

    @property
    def is_binary(self) -> bool:
        """Whether each sample is right or wrong."""
        return bool(np.isin(self.values, (0.0, 1.0)).all())

    @property
    def is_share(self) -> bool:
        return self.is_binary


class RatioScores(Scores):
    """A metric that follows from a sum over samples by another sum, such as perplexity per word.

    Args:
        pairs: Numerator and denominator of each sample, such as log-likelihood and number of words.
        transform: From the ratio to the metric; works on arrays.
    """

    def __init__(self, pairs: Sequence[Sequence[float]], transform: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        self.numerator, self.denominator = np.asarray(pairs, dtype=np.float64).reshape(-1, 2).T
        self.transform = transform

    def __len__(self) -> int:
        return len(self.numerator)

    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        return self.transform(self.numerator[index].sum(-1) / self.denominator[index].sum(-1))

    @property
    def entries(self) -> Sequence[tuple[float, float]]:
        return list(zip(self.numerator.tolist(), self.denominator.tolist(), strict=True))


class ResampledScores(Scores):
    """Any other metric: recomputed from the chosen samples by its own aggregation."""

    def __init__(self, items: Sequence[Any], aggregate: Callable[[list[Any]], float]) -> None:
        self.items = items
        self.aggregate = aggregate

    def __len__(self) -> int:
        return len(self.items)

    def value(self, index: NDArray[Any]) -> NDArray[Any]:
        rows = index.reshape(-1, index.shape[-1])
        values = [self.aggregate([self.items[i] for i in row]) for row in rows]
        return np.array(values, dtype=np.float64).reshape(index.shape[:-1])

    @property
    def entries(self) -> Sequence[Any]:
        return self.items


class _ClusteredRatio(RatioScores):
    """A ratio of sums over clusters of samples.

    Args:
        pairs: As in `RatioScores`, one for each cluster.
        transform: As in `RatioScores`.
        num_samples: Samples in all clusters.
        is_share: Whether the metric is the share of samples that are right.
        extremes: The lowest and the highest score of a sample, of a metric that is a mean of them.
    """

    def __init__(
        self,
        pairs: NDArray[Any],
        transform: Callable[[NDArray[Any]], NDArray[Any]],
        num_samples: int,
        is_share: bool,
        extremes: tuple[float, float] | None,
    ) -> None:
        super().__init__(pairs.tolist(), transform)
        self._num_samples = num_samples
        self._is_share = is_share
        self._extremes = extremes

    @property
    def num_samples(self) -> int:
        return self._num_samples

    @property
    def is_share(self) -> bool:
        return self._is_share

    @property
    def extremes(self) -> tuple[float, float] | None:
        return self._extremes


class _ClusteredItems(ResampledScores):
    """A metric that is recomputed from the samples of the chosen clusters."""

    def __init__(self, clusters: Sequence[Sequence[Any]], aggregate: Callable[[list[Any]], float]) -> None:
        super().__init__(clusters, lambda chosen: aggregate([item for cluster in chosen for item in cluster]))
        self._num_samples = sum(map(len, clusters))

    @property
    def num_samples(self) -> int:
        return self._num_samples


def clustered(scores: Scores, labels: Sequence[int] | None) -> Scores:
    """Makes scores of clusters out of scores of samples, so that clusters are what is resampled.

    Samples that share something, such as questions on one passage, are right or wrong together: they know less than as
    many independent ones (Miller 2024, arXiv 2411.00640, Sec. 2.2). The metric over all stays what it was.

    Args:
        scores: One entry for each sample.
        labels: The cluster of each sample, numbered from 0; `None` for samples that are independent.

    Raises:
        ValueError: If there are not as many labels as samples.
    """
    if labels is None:
        return scores
    number = np.asarray(labels, dtype=np.intp)
    if len(number) != len(scores):
        raise ValueError(f"{len(number)} cluster labels are not one for each of {len(scores)} samples.")
    if isinstance(scores, ResampledScores):
        members: list[list[Any]] = [[] for _ in range(number.max() + 1)]
        for item, label in zip(scores.items, labels, strict=True):
            members[label].append(item)
        return _ClusteredItems(members, scores.aggregate)
    transform: Callable[[NDArray[Any]], NDArray[Any]] = _identity
    if isinstance(scores, MeanScores):
        pairs = np.column_stack([scores.values, np.ones(len(scores))])
    else:
        assert isinstance(scores, RatioScores)
        pairs, transform = np.column_stack([scores.numerator, scores.denominator]), scores.transform
    sums = np.column_stack([np.bincount(number, weights=column) for column in pairs.T])
    return _ClusteredRatio(sums, transform, len(scores), scores.is_share, scores.extremes)


def tied(one: Scores, other: Scores) -> NDArray[np.bool_]:
    """Returns on which samples two models have exactly the same score, shape (samples,).

    Args:
        one: One model's scores.
        other: The other's, on the same samples.
    """
    pairs = zip(one.entries, other.entries, strict=True)
    return np.array([first == second or repr(first) == repr(second) for first, second in pairs])  # nan is no nan


def _identity(ratio: NDArray[Any]) -> NDArray[Any]:
    return ratio
