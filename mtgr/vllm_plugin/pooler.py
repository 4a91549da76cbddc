"""The heads: what becomes of a step's trunk outputs, request by request."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.v1.pool.metadata import PoolingMetadata

from mtgr.model.mtgr import MTGR
from mtgr.vllm_plugin import CANDIDATES

TASK = "token_classify"


class ScorePooler(Pooler):
    """Scores the candidates of requests that have some, retrieves items for the others.

    All requests of a step go through the heads together.

    Args:
        network: Has the heads.
        rows: INT32 [max_tokens, W], the step's rows.

    Attributes:
        scores: FP32 [T, tasks], where they were computed with the step's trunk; None where that is left to do.
    """

    def __init__(self, network: MTGR, rows: Tensor) -> None:
        super().__init__()
        # In lists, so that they are not this module's parameters a second time.
        self._network = [network]
        self._rows = [rows]
        self.scores: Tensor | None = None

    def get_supported_tasks(self) -> Set[str]:
        """The one task that returns a vector per token."""
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """Outputs of the requests of a step.

        Args:
            hidden_states: Float [T, d].
            pooling_metadata: Which tokens are whose, and how many candidates each request has.

        Returns:
            To rank, FP32 [k, T] probabilities; to retrieve, FP64 [m, 2] item ids and logits, which are exact in it.
            A request whose candidates are not all in this step, which the scheduler rules out, gets NaN: an
            exception here would end the engine for everyone.
        """
        counts = pooling_metadata.get_pooling_cursor().num_scheduled_tokens_cpu.tolist()
        wanted = [int((params.extra_kwargs or {}).get(CANDIDATES, 0)) for params in pooling_metadata.pooling_params]
        outputs: list[Tensor | None] = [None] * len(counts)
        ranked: list[int] = []
        retrieved: list[int] = []
        ranges: list[Tensor] = []
        last: list[int] = []
        end = 0
        for request, (count, candidates) in enumerate(zip(counts, wanted, strict=True)):
            end += count
            if candidates == 0:
                retrieved.append(request)
                last.append(end - 1)
            elif candidates <= count:
                ranked.append(request)
                ranges.append(torch.arange(end - candidates, end))
            else:
                outputs[request] = hidden_states.new_full((candidates, 1), float("nan"), dtype=torch.float32)
        if ranked:
            scores = self._rank(hidden_states, torch.cat(ranges))
            for request, part in zip(ranked, scores.split([wanted[index] for index in ranked]), strict=True):
                outputs[request] = part
        if retrieved:
            for request, part in zip(retrieved, self._retrieve(hidden_states, torch.tensor(last)), strict=True):
                outputs[request] = part
        return outputs

    def _rank(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        if self.scores is not None:
            # A copy in any case: the next step writes its own scores there.
            first, last = int(tokens[0]), int(tokens[-1]) + 1
            if last - first == len(tokens):
                return self.scores[first:last].clone()
            return self.scores[tokens.to(hidden_states.device, non_blocking=True)]
        index = tokens.to(hidden_states.device, non_blocking=True)
        return self._network[0].task_logits(hidden_states[index], self._rows[0][index]).sigmoid()

    def _retrieve(self, hidden_states: Tensor, tokens: Tensor) -> Tensor:
        network = self._network[0]
        x = hidden_states[tokens.to(hidden_states.device, non_blocking=True)]
        items, scores = network.best_items(network.next_item_logits_of(x))
        return torch.stack([items.double(), scores.double()], dim=-1)
