"""The ``baseline`` engine: the reference network, run eagerly by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mtgr.checkpoint import load_checkpoint
from mtgr.engines.pending import Arrays, Done
from mtgr.engines.rows import RowChecker
from mtgr.errors import ConfigurationError, InvalidRequestError
from mtgr.model import MTGR


class BaselineEngine:
    """Ranks or retrieves batches of rows.

    Args:
        checkpoint: Directory of the checkpoint.
        device: PyTorch device, such as ``cpu`` or ``cuda:1``.

    Raises:
        ConfigurationError: If the checkpoint is missing or damaged, or the device is not there.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        loaded = load_checkpoint(checkpoint)
        self.schema = loaded.schema
        self.device = torch.device(device)
        self._checker = RowChecker(loaded.schema, loaded.model.config.max_positions)
        try:
            self.model = loaded.model.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(f"the model cannot be placed on {device}: {error}") from error
        if isinstance(self.model, MTGR):
            self.model.keep_constants()

    def infer(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run one batch.

        Args:
            inputs: ``context`` INT32 [B, n, W] and, to rank, ``candidates`` INT32 [B, k, W].

        Returns:
            ``task_scores`` FP32 [B, k, T] with candidates; ``items`` INT32 [B, m] and ``scores`` FP32 [B, m] without.

        Raises:
            InvalidRequestError: If the rows have another width than the schema's, an id is out of range, or there is no
                context.
        """
        for name, rows in inputs.items():
            if rows.ndim != 3 or rows.shape[2] != self.schema.width:
                raise InvalidRequestError(
                    f"{name} has shape {list(rows.shape)}; it must be [batch, tokens, {self.schema.width}]."
                )
        if "context" not in inputs or inputs["context"].shape[1] == 0:
            raise InvalidRequestError("context has no tokens; it must have at least one.")
        self._checker.check_context(inputs["context"])
        if "candidates" in inputs:
            self._checker.check_candidates(inputs["candidates"])
        context = self._tensor(inputs["context"])
        with torch.inference_mode():
            if "candidates" in inputs:
                return {"task_scores": self.model(context, self._tensor(inputs["candidates"])).cpu().numpy()}
            items, scores = self.model.retrieve(context)
            return {"items": items.cpu().numpy(), "scores": scores.cpu().numpy()}

    def submit(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Done:
        """A batch as engines take it that compute while the caller goes on; this one is done when it returns."""
        return Done(self.infer(inputs))

    def _tensor(self, rows: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int32)).to(self.device)
