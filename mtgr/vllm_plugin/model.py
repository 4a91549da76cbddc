"""MTGR as a model of vLLM: the reference network, its attention taken to the paged cache."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces_base import VllmModelForPooling

from mtgr.errors import ConfigurationError
from mtgr.kernels.dispatch import use_triton
from mtgr.kernels.norm import fp8_group_norm, fp8_residual_group_norm, gated_group_norm, residual_group_norm
from mtgr.kernels.paged_attention import PagedBias, time_bucket_edges, warm_up
from mtgr.model.hstu import HSTUBlock
from mtgr.model.mtgr import MTGR
from mtgr.model.norm import GroupLayerNorm
from mtgr.schema import SLOT_COLUMN, TYPE_COLUMN, TokenType
from mtgr.vllm_plugin import CUDA_GRAPHS, QUANTIZATION
from mtgr.vllm_plugin.attention import PagedAttention, Step, TokenTimes
from mtgr.vllm_plugin.config import MTGRConfig
from mtgr.vllm_plugin.graphs import StepGraphs
from mtgr.vllm_plugin.linear import FP8Linear, fp8_network
from mtgr.vllm_plugin.parallel import Ranks, WeightSplit, check_ranks, rank_config, vllm_ranks
from mtgr.vllm_plugin.pooler import ScorePooler
from mtgr.vllm_plugin.rows import RowCodec
from mtgr.vllm_plugin.split_norm import fp8_split_group_norm, split_group_norm
from mtgr.vllm_plugin.step import StepMetadata
from mtgr.vllm_plugin.wanted_rows import WantedRows


class MTGRForRecommendation(nn.Module, VllmModelForPooling):
    """Ranks and retrieves; its pooler says which, request by request.

    Parameters are ``mtgr.model``'s own, and so are the embedding and the heads; a block's kernels follow its equations.
    With tensor parallelism this is a rank's part of the network (``mtgr.vllm_plugin.parallel``), and H its heads.
    Shapes: T tokens of a step, padding included.
    """

    is_pooling_model = True
    rows: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: MTGRConfig = vllm_config.model_config.hf_config
        if config.mtgr is None:
            raise ConfigurationError("config.json of the model has no key 'mtgr'; run `make export`.")
        model, schema = config.network_config, config.schema
        dtype = vllm_config.model_config.dtype
        self.config = config
        self.codec = RowCodec(schema)
        self.ranks = vllm_ranks()
        check_ranks(self.ranks.size, model, "config.json")
        own = rank_config(model, self.ranks.size)
        is_fp8 = vllm_config.additional_config.get(QUANTIZATION) == "fp8"
        num_features = int(config.mtgr["num_features"])
        if is_fp8:
            self.network = fp8_network(own, schema, num_features, is_whole=self.ranks.size == 1).eval()
        else:
            self.network = MTGR(own, schema, num_features).eval()
        self.attention = nn.ModuleList(
            PagedAttention(f"layers.{index}", own.num_heads, own.dqk, own.attention_norm_length, dtype)
            for index in range(own.num_layers)
        )
        self.times = TokenTimes("times.0") if model.relative_bias else None
        self._bias_tables: list[tuple[Tensor, Tensor]] = []
        self._bucket_edges: Tensor | None = None
        self._block_size = vllm_config.cache_config.block_size
        self._max_tokens = vllm_config.model_config.max_model_len
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # The pooler reads candidate rows here: a captured graph writes to this very memory again.
        self.register_buffer("rows", torch.zeros(max_tokens, schema.width, dtype=torch.int32), persistent=False)
        self.pooler = ScorePooler(self.network, self.rows)
        captured = self.rows.is_cuda and vllm_config.additional_config.get(CUDA_GRAPHS, False)
        self.graphs = StepGraphs(self._trunk_and_scores, max_tokens, self.ranks.size > 1) if captured else None

    def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows of padding: requests never have token ids."""
        dtype = self.network.output_norm.gain.dtype
        return torch.zeros(*input_ids.shape, self.codec.width, dtype=dtype, device=input_ids.device)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Trunk outputs, float [T, d], of rows in the form of ``RowCodec``, float [T, bytes]."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(positions)
        metadata = self._metadata()
        captured = None if self.graphs is None or metadata is None else self.graphs.run(inputs_embeds, metadata)
        if captured is None:
            self.pooler.scores = None
            return self.trunk(inputs_embeds, metadata)
        hidden, self.pooler.scores = captured
        return hidden

    def _trunk_and_scores(self, embeds: Tensor, metadata: StepMetadata) -> tuple[Tensor, Tensor]:
        """Trunk outputs, float [T, d], and scores, FP32 [T, tasks], those of context tokens without a meaning.

        Scored with the trunk, candidates cost one launch less a kernel, and context tokens next to nothing; where
        they would, ``WantedRows`` leaves them out, and their scores may be NaN.
        """
        hidden = self.trunk(embeds, metadata)
        rows = self.rows[: len(embeds)]
        is_candidate = rows[:, TYPE_COLUMN] == TokenType.CANDIDATE
        # Other tokens' ids are of other tables.
        rows = rows.masked_fill(~is_candidate[:, None], 0)
        if self._wanted_rows is not None:
            return hidden, self._wanted_rows.task_logits(hidden, rows, is_candidate).sigmoid()
        return hidden, self.network.task_logits(hidden, rows).sigmoid()

    def trunk(self, embeds: Tensor, metadata: StepMetadata | None) -> Tensor:
        """Trunk outputs, float [T, d]; without metadata vLLM only measures memory, and nothing is attended to."""
        rows, visible = self.codec.decode(embeds)
        self.rows[: len(rows)].copy_(rows)
        types = rows[:, TYPE_COLUMN]
        step = self._step(metadata, rows, visible, types == TokenType.CANDIDATE)
        x = self._embed(rows, visible, step.is_candidate)
        update: Tensor | None = None
        blocks: Iterable[tuple[Any, Any]] = zip(self.network.blocks, self.attention, strict=True)
        for index, (block, attention) in enumerate(blocks):
            bias = None if step.bias is None else step.bias.for_layer(*self._bias_tables[index])
            x, update = _block(block, attention, x, update, types, step, bias, self.ranks)
        return _normalise(self.network.output_norm, x, update, types)[1]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take the checkpoint's tensors, of divided ones this rank's part.

        Raises:
            ConfigurationError: If one is missing, unknown, or of another shape.
        """
        layers = {f"{name}.": layer for name, layer in self.network.named_modules() if isinstance(layer, FP8Linear)}
        quantised = {f"{name}weight": layer for name, layer in layers.items()}
        made = {f"{name}{part}" for name in layers for part in ("data", "scales")}
        own = {name: tensor for name, tensor in self.network.state_dict().items() if name not in made}
        shapes = {name: tensor.shape for name, tensor in own.items()}
        shapes |= {name: torch.Size(layer.shape) for name, layer in quantised.items()}
        split = WeightSplit(self.config.network_config, self.ranks)
        shapes = {name: split.whole_shape(name, shape) for name, shape in shapes.items()}
        loaded = set()
        for name, tensor in weights:
            if shapes.get(name) != tensor.shape:
                raise ConfigurationError(
                    f"{name} in model.safetensors does not belong to the model in config.json; run `make export` again."
                )
            part = split.part(name, tensor)
            if name in quantised:
                quantised[name].load(part)
            else:
                own[name].copy_(part)
            loaded.add(name)
        missing = set(shapes) - loaded
        if missing:
            raise ConfigurationError(f"model.safetensors lacks {min(missing)}; run `make export` again.")
        self.network.keep_constants()
        self._warm_up_attention()
        return {f"network.{name}" for name in loaded}

    def _warm_up_attention(self) -> None:
        """Compile and measure attention for steps of every size, so that no request waits for it; on GPUs only."""
        first: PagedAttention = self.attention[0]  # type: ignore[assignment]
        table = self.network.relative_bias
        warm_up(
            first.num_heads,
            first.head_size,
            first.dtype,
            self._block_size,
            has_bias=table is not None,
            device=self.rows.device,
            out_dtype=first.out_dtype,
            max_tokens=len(self.rows),
            max_keys=self._max_tokens,
        )

    @cached_property
    def _wanted_rows(self) -> WantedRows | None:
        """Made by the first step, which vLLM runs to measure memory: with weights, and before graphs are captured."""
        return WantedRows.of(self.network)

    def _embed(self, rows: Tensor, visible: Tensor, is_candidate: Tensor) -> Tensor:
        """Float [T, d]."""
        embedding = self.network.embedding
        if not rows.is_cuda:
            x = torch.empty(len(rows), self.config.network_config.d_model, dtype=self.network.output_norm.gain.dtype)
            x[~is_candidate] = embedding.context(rows[~is_candidate])
            x[is_candidate] = embedding.candidates(rows[is_candidate], visible[is_candidate])
            return x
        if self._wanted_rows is not None:
            return self._wanted_rows.embed(rows, visible, is_candidate)
        # On a GPU nothing may wait for how many there are of each: both embeddings take all tokens, and each is shown
        # padding where the other's rows stand, whose ids it may not have.
        context = embedding.context(rows.masked_fill(is_candidate[:, None], 0))
        candidates = embedding.candidates(
            rows.masked_fill(~is_candidate[:, None], 0), visible.masked_fill(~is_candidate, 0)
        )
        return torch.where(is_candidate[:, None], candidates, context)

    def _metadata(self) -> StepMetadata | None:
        first: PagedAttention = self.attention[0]  # type: ignore[assignment]
        return first.metadata()

    def _step(self, metadata: StepMetadata | None, rows: Tensor, visible: Tensor, is_candidate: Tensor) -> Step:
        if metadata is None:
            return Step(None, is_candidate, visible, None, None)
        slots = metadata.slots[: len(rows)].masked_fill(is_candidate, -1)
        return Step(metadata, is_candidate, visible, slots, self._bias(rows, visible, is_candidate, slots))

    def _bias(self, rows: Tensor, visible: Tensor, is_candidate: Tensor, slots: Tensor) -> PagedBias | None:
        relative = self.network.relative_bias
        if relative is None or self.times is None:
            return None
        if self._bucket_edges is None:
            self._bias_tables = list(
                zip(
                    relative.position_table.t().contiguous().unbind(0),
                    relative.time_table.t().contiguous().unbind(0),
                    strict=True,
                )
            )
            self._bucket_edges = time_bucket_edges(relative.time_bucket, relative.time_buckets, rows.device)
        times = rows[:, self.network.time_column].contiguous()
        return PagedBias(
            *self._bias_tables[0],
            relative.max_positions,
            torch.where(is_candidate, visible, rows[:, SLOT_COLUMN]),
            times,
            self.times.store(times, slots),
            self._bucket_edges,
        )


def _block(
    block: HSTUBlock,
    attention: PagedAttention,
    x: Tensor,
    update: Tensor | None,
    types: Tensor,
    step: Step,
    bias: PagedBias | None,
    ranks: Ranks,
) -> tuple[Tensor, Tensor | None]:
    """``HSTUBlock.forward`` with the keys of the context in the paged cache; the same on every rank.

    Takes and returns the residual stream, float [T, d], and the update that it still lacks, likewise, or None: the next
    norm reads the stream anyway and adds the two on its way, which saves a pass over memory.
    """
    norm, layer = block.input_norm, block.uvqk
    # On a GPU those kernels that read U, V, Q and K anyway put them through SiLU, unless the product's own does.
    if isinstance(layer, FP8Linear):
        is_raw = layer.by_row and use_triton(x)
        x, rows = fp8_residual_group_norm(x, update, types, norm.gain, norm.bias, norm.epsilon, by_row=layer.by_row)
        merged = layer(rows, is_silu=not is_raw)
    else:
        is_raw = use_triton(x)
        x, normal = _normalise(norm, x, update, types)
        merged = layer(normal)
        merged = merged if is_raw else F.silu(merged)
    u, v, q, k = merged.split(block.split, dim=-1)
    q, k, v = (part.unflatten(-1, (block.num_heads, -1)) for part in (q, k, v))
    attended = attention(q, k, v, step, bias, is_raw).flatten(1)
    norm, last = block.output_norm, block.output
    if ranks.size > 1:
        normalise = fp8_split_group_norm if isinstance(last, FP8Linear) else split_group_norm
        gated = normalise(attended, types, norm.gain, norm.bias, norm.epsilon, u, ranks, activates=is_raw)
        return x + ranks.all_reduce(block.output(gated)), None
    if isinstance(last, FP8Linear):
        rows = fp8_group_norm(
            attended, types, norm.gain, norm.bias, norm.epsilon, u, by_row=last.by_row, activates=is_raw
        )
        return x, last(rows)
    # ``HSTUBlock.update`` but for the sum, and for dropout, which is of training.
    return x, last(gated_group_norm(attended, types, norm.gain, norm.bias, norm.epsilon, u, activates=is_raw))


def _normalise(norm: GroupLayerNorm, x: Tensor, update: Tensor | None, types: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream with its update, and that normalised; each float [T, d]."""
    return residual_group_norm(x, update, types, norm.gain, norm.bias, norm.epsilon)
