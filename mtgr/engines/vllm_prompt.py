"""What vLLM gets of a request: the bytes of its rows, and what the plugin is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtgr.vllm_plugin import CANDIDATES, CONTEXT_TOKENS, STATIC_TOKENS

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Prompt:
    """What vLLM gets of one request."""

    embeds: torch.Tensor
    params: Any
    salt: str
    context_tokens: int


@dataclass(frozen=True)
class Context:
    """A context without padding.

    Attributes:
        packed: UINT8 [n, width], its rows in bytes.
        static: Profile and history tokens.
        salt: Digest of these, by which requests share pages.
        dtype: Of the model.
    """

    packed: UInt8Array
    static: int
    salt: str
    dtype: torch.dtype

    def prompt(self, candidates: UInt8Array | None = None) -> Prompt:
        """The context, and the bytes of candidates, UINT8 [k, width], after it."""
        from vllm import PoolingParams

        n, k = len(self.packed), 0 if candidates is None else len(candidates)
        packed = self.packed if candidates is None else np.concatenate([self.packed, candidates])
        params = PoolingParams(
            task="token_classify",
            extra_kwargs={CONTEXT_TOKENS: n, STATIC_TOKENS: self.static, CANDIDATES: k},
            skip_reading_prefix_cache=False,
        )
        return Prompt(torch.from_numpy(packed).to(self.dtype), params, self.salt, n)
