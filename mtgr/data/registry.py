"""Datasets by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mtgr.data.dataset import Dataset
from mtgr.data.kuairand import WATCHED, KuaiRand
from mtgr.data.movielens import MovieLens100K
from mtgr.data.movielens_large import MovieLens1M, MovieLens20M
from mtgr.errors import ConfigurationError


@dataclass(frozen=True)
class DatasetEntry:
    """How to get a dataset, and what it means to like something in it.

    Attributes:
        factory: Makes the dataset; data are read when first asked for.
        liked_action: Actions from this one on count as liked in cross features.
    """

    factory: Callable[[], Dataset]
    liked_action: int


DATASETS: dict[str, DatasetEntry] = {
    "movielens-100k": DatasetEntry(MovieLens100K, liked_action=3),  # 4 or 5 stars
    "movielens-1m": DatasetEntry(MovieLens1M, liked_action=3),
    "movielens-20m": DatasetEntry(MovieLens20M, liked_action=7),  # 4 stars or more, in halves
    "kuairand-pure": DatasetEntry(lambda: KuaiRand("pure"), liked_action=WATCHED),
    "kuairand-1k": DatasetEntry(lambda: KuaiRand("1k"), liked_action=WATCHED),
}


def find_dataset(name: str) -> DatasetEntry:
    """The entry of ``name``.

    Raises:
        ConfigurationError: If there is none.
    """
    if name not in DATASETS:
        raise ConfigurationError(f"there is no dataset {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]
