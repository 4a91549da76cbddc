"""Stochastic length (HSTU, arXiv 2402.17152, section 3.3, equation 4): long histories are trained on in parts.

With alpha in (1, 2] and N the longest history, a history of n events is taken

    whole                                  if n <= N^(alpha / 2)
    as a random subsequence of N^(alpha/2) with probability 1 - N^alpha / n^2
    whole                                  otherwise

so that attention costs N^alpha instead of N^2. Only segment S is thinned: profile tokens and real-time tokens, which
carry the next-item labels, stay, and every token keeps its slot, type and time.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mtgr.data.samples import Sample
from mtgr.schema import TYPE_COLUMN, TokenType


def threshold(longest: int, alpha: float) -> int:
    """N^(alpha / 2): events that every history may keep."""
    return max(1, int(longest ** (alpha / 2)))


def shorten(sample: Sample, longest: int, alpha: float, generator: np.random.Generator) -> Sample:
    """The sample, or the same with a random subsequence of its segment S.

    The last static token is kept if it carries a label.

    Args:
        sample: The sample.
        longest: N, events of the longest segment S.
        alpha: Exponent in (1, 2]; 2 keeps everything.
        generator: Decides whether and which tokens stay; drawn from for long histories only.
    """
    history = np.flatnonzero(sample.context[:, TYPE_COLUMN] == TokenType.HISTORY)
    kept = threshold(longest, alpha)
    if len(history) <= kept or generator.random() < longest**alpha / len(history) ** 2:
        return sample
    stays = np.ones(len(sample.context), dtype=np.bool_)
    droppable = history[sample.next_items[history] == 0]
    labelled = len(history) - len(droppable)
    dropped = generator.choice(droppable, size=len(droppable) - max(kept - labelled, 0), replace=False)
    stays[dropped] = False
    return dataclasses.replace(sample, context=sample.context[stays], next_items=sample.next_items[stays])
