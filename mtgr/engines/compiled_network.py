"""The network as the ``compiled`` engine runs it: the reference's weights and equations, taken to the kernels.

Nothing here waits for the GPU, and every shape follows from the inputs' shapes, so that a batch can be captured into a
CUDA graph. On the CPU the kernels' PyTorch twins serve.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mtgr.engines.compiled_embedding import MergedEmbedding
from mtgr.errors import ConfigurationError
from mtgr.kernels.bias import time_bucket_edges
from mtgr.kernels.dense_attention import dense_attention
from mtgr.kernels.dense_bias import DenseBias
from mtgr.kernels.dense_configs import DenseKey, choose, length_class
from mtgr.kernels.dense_segments import CONTEXT, Segments
from mtgr.kernels.dense_tuning import warm_up_dense
from mtgr.kernels.dispatch import capability_of
from mtgr.kernels.embedding import segment_rows
from mtgr.kernels.linear import QuantisedRows, QuantisedWeight, fp8_linear, linear_silu, quantise_weight
from mtgr.kernels.linear_tuning import fp8_by_row, has_library_fp8, tune_fp8, tune_silu
from mtgr.kernels.norm import fp8_group_norm, gated_group_norm, group_norm
from mtgr.model import MTGR
from mtgr.model.bias import RelativeBias
from mtgr.model.heads import MMoEHeads, SharedBottomHeads
from mtgr.model.hstu import HSTUBlock
from mtgr.model.mask import visible_by_order
from mtgr.model.norm import GroupLayerNorm
from mtgr.schema import SLOT_COLUMN, TYPE_COLUMN, TokenType

# Rows of the tokens whose output is needed, float [B, m, any], of all, [B, n + k, any].
Pick = Callable[[Tensor], Tensor]

# ``fp8``: linear layers of all blocks but the last in e4m3 with per-block scales, all else in FP16. What the last block
# rounds goes straight into the scores, and it costs least: of most tokens only keys and values are computed there.
CompiledPrecision = Literal["fp32", "fp16", "bf16", "fp8"]

# What A V is divided by in FP16: a product of attention may reach a million, and 1e-3 has all its digits.
_FP16_DIVISOR = 16

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float16}


@dataclass(frozen=True, eq=False)
class Batch:
    """What all blocks of a batch share.

    Attributes:
        types: INT32 [B * (n + k)], token types.
        segments: Where each sequence's tokens stand.
        shape: B, n, k.
        bias: What the kernel makes a relative bias of, or None.
        visible: Float [B, 1, n + k, n], only where no kernel fits and the attention's weights are materialised.
        biases: There the relative bias of each layer, float [B, 1, n + k, n], or empty.
        self_biases: Of a token to itself, scalars, or empty.
    """

    types: Tensor
    segments: Segments
    shape: tuple[int, int, int]
    bias: DenseBias | None = None
    visible: Tensor | None = None
    biases: list[Tensor] = field(default_factory=list)
    self_biases: list[Tensor] = field(default_factory=list)


class Projection:
    """A block's linear layer, rounded to FP8 on request.

    Args:
        weight: Float [N, K].
        bias: Float [N].
        is_fp8: Whether weight and inputs are rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor, is_fp8: bool = False) -> None:
        self.weight, self.bias, self.is_fp8 = weight, bias, is_fp8
        self._by_block = quantise_weight(weight) if is_fp8 else None
        self._by_row: QuantisedWeight | None = None
        if self._by_block is not None and has_library_fp8(self._by_block.data):
            self._rounded(by_row=True)

    def silu(self, x: Tensor | QuantisedRows) -> Tensor:
        """SiLU(x W^T + b), float [T, N] of [T, K]."""
        if isinstance(x, QuantisedRows):
            return fp8_linear(x, self._rounded(x.by_row), self.bias, is_silu=True)
        return linear_silu(x, self.weight, self.bias)

    def add_to(self, target: Tensor, x: Tensor | QuantisedRows) -> Tensor:
        """``target`` + x W^T, float [T, N], in its place; the bias too if ``adds_bias``."""
        if isinstance(x, QuantisedRows):
            return target.add_(fp8_linear(x, self._rounded(x.by_row), self.bias))
        return target.addmm_(x, self.weight.T)

    def tune(self, rows: int) -> None:
        """Have the fastest product serve inputs of so many rows."""
        if self._by_block is not None:
            other = None if self._by_row is None else (self._by_row.data, self._by_row.scales)
            tune_fp8(rows, self._by_block.data, self._by_block.scales, self.bias, other)
        elif self.weight.dtype.itemsize == 2:
            tune_silu(rows, self.weight, self.bias)

    @property
    def adds_bias(self) -> bool:
        """Whether ``add_to`` adds the bias."""
        return self.is_fp8

    def takes_rows(self, rows: int) -> bool:
        """Whether FP8 inputs of so many rows are to have one scale a row."""
        return self._by_block is not None and fp8_by_row(rows, self._by_block.data)

    def _rounded(self, by_row: bool) -> QuantisedWeight:
        """The weight in FP8, each form made once: on a GPU that multiplies by rows, both at the start."""
        if by_row and self._by_row is None:
            self._by_row = quantise_weight(self.weight, by_row=True)
        made = self._by_row if by_row else self._by_block
        assert made is not None
        return made


class CompiledNetwork:
    """Ranks and retrieves like ``MTGR``, in inference only.

    Rows must be in order: profile and history, real-time, padding (``mtgr.engines.checks.check_order``).

    Args:
        model: The network in FP32; it is copied if it is converted.
        precision: Of the computation.
        device: Where to compute.

    Raises:
        ConfigurationError: If there is no such precision.
    """

    def __init__(self, model: MTGR, precision: CompiledPrecision = "fp32", device: torch.device | str = "cpu") -> None:
        if precision not in get_args(CompiledPrecision):
            raise ConfigurationError(
                f"precision is {precision!r}; choose one of {', '.join(get_args(CompiledPrecision))}."
            )
        self.precision, self.dtype = precision, _DTYPES[precision]
        self.model = _converted(model, self.dtype).to(device).eval().requires_grad_(False)
        self.model.keep_constants()
        self.embed = MergedEmbedding(self.model.embedding)
        config = self.model.config
        self.is_causal = config.static_attention == "causal"
        # The kernel has one width for queries and values.
        self.has_kernel = config.dqk == config.dv
        self.bias_tables, self.bucket_edges = _bias_tables(self.model.relative_bias)
        # A V / N may underflow in FP16. The norm that follows does not see a factor whose square its epsilon carries.
        length = config.attention_norm_length
        self.divisor = min(length, _FP16_DIVISOR) if self.dtype == torch.float16 else length
        self.attended_epsilon = config.norm_epsilon * (length / self.divisor) ** 2
        self.blocks: list[HSTUBlock] = list(self.model.blocks)  # type: ignore[arg-type]
        self.is_fp8 = is_fp8 = precision == "fp8"
        *rounded, last = self.blocks
        self.uvqk = [Projection(block.uvqk.weight, block.uvqk.bias, is_fp8) for block in rounded]
        self.output = [Projection(block.output.weight, block.output.bias, is_fp8) for block in rounded]
        self.output.append(Projection(last.output.weight, last.output.bias))
        self.shifts = _shifts(self.output)
        weights, biases = (part.split(last.split) for part in (last.uvqk.weight, last.uvqk.bias))
        self.last_uq, self.last_vk = (
            Projection(torch.cat(weights[part::2]), torch.cat(biases[part::2])) for part in (0, 1)
        )
        self.last_u = Projection(weights[0].contiguous(), biases[0].contiguous())
        self.last_vqk = Projection(torch.cat(weights[1:]), torch.cat(biases[1:]))

    @torch.inference_mode()
    def tune(self, batch: int, context: int, candidates: int) -> None:
        """Measure several ways of computing attention and products for a padded shape and take the fastest."""
        config = self.model.config
        if self.has_kernel:
            warm_up_dense(
                config.num_heads,
                config.dqk,
                self.dtype,
                batch=batch,
                context=context,
                num_candidates=candidates,
                has_bias=bool(self.bias_tables),
                device=self.embed.positions.device,
            )
        rows = batch * (context + candidates)
        is_ranked = self.has_kernel and candidates > 0
        last, picked = (self.last_vqk, self.last_u) if is_ranked else (self.last_vk, self.last_uq)
        for projection in (*self.uvqk[:1], last, *(self.output[:-1][:1] if self.is_fp8 else [])):
            projection.tune(rows)
        picked.tune(batch * candidates or batch)

    @torch.inference_mode()
    def rank(self, context: Tensor, candidates: Tensor) -> Tensor:
        """FP32 [B, k, T] probabilities of INT32 [B, n, W] and [B, k, W]."""
        n = context.shape[1]
        x = self._trunk(context, candidates, lambda rows: rows[:, n:])
        logits: Tensor = _head_logits(self.model.task_heads, x) + self.model.wide_terms(candidates)
        return logits.sigmoid()

    @torch.inference_mode()
    def retrieve(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """INT32 [B, m] items and FP32 [B, m] logits of INT32 [B, n, W], as ``MTGR.retrieve`` gives them."""
        lengths = (context[..., TYPE_COLUMN] != TokenType.PADDING).sum(dim=1)
        last = (lengths - 1).clamp(min=0)[:, None, None]
        x = self._trunk(context, context[:, :0], lambda rows: rows.gather(1, last.expand(-1, 1, rows.shape[2])))
        return self.model.best_items(self.model.next_item_logits_of(x.squeeze(1)))

    def _trunk(self, context: Tensor, candidates: Tensor, pick: Pick) -> Tensor:
        """Normalised float [B, m, d] of the tokens that are picked: candidates, or the last context token."""
        batch = self.batch(context, candidates)
        x = self.embed(context, candidates, batch.segments)
        x = self._last_block(self.apply_blocks(x, batch), batch, pick)
        types = pick(batch.types.view(len(context), -1, 1))
        return _normalised(self.model.output_norm, x, types.flatten(), self.shifts[-1]).view(*types.shape[:2], -1)

    def apply_blocks(self, x: Tensor, batch: Batch) -> Tensor:
        """What all blocks but the last make of embedded tokens, float [B * (n + k), d], which is changed in place."""
        for index, block in enumerate(self.blocks[:-1]):
            x = self._block(block, index, x, batch)
        return x

    def batch(self, context: Tensor, candidates: Tensor) -> Batch:
        """What the blocks take beside the tokens of INT32 [B, n, W] and [B, k, W]."""
        size, n, _ = context.shape
        types, segments = segment_rows(context, candidates, is_causal=self.is_causal)
        shape = (size, n, candidates.shape[1])
        if self.has_kernel:
            return Batch(types, segments, shape, self._bias(context, candidates))
        rows = torch.cat([context, candidates], dim=1)
        slots, key_slots = rows[..., SLOT_COLUMN], context[..., SLOT_COLUMN]
        visible = visible_by_order(slots, types.view(size, -1)[:, :n], key_slots, self.model.config.static_attention)
        relative = self.model.relative_bias
        biases: list[Tensor] = []
        self_biases: list[Tensor] = []
        if relative is not None:
            ends = segments.sequences[:, CONTEXT, None].expand(size, candidates.shape[1])
            positions = torch.cat([key_slots, ends], dim=1)
            times = rows[..., self.model.time_column]
            biases = [layer.to(self.dtype) for layer in relative(positions, key_slots, times, times[:, :n])]
            self_biases = [layer.to(self.dtype) for layer in relative.self_bias()]
        return Batch(types, segments, shape, None, visible.unsqueeze(1).to(self.dtype), biases, self_biases)

    def _bias(self, context: Tensor, candidates: Tensor) -> DenseBias | None:
        """What the first layer's relative bias is made of, or None."""
        if self.model.relative_bias is None or self.bucket_edges is None:
            return None
        column = self.model.time_column
        times = torch.cat([context[..., column], candidates[..., column]], dim=1).flatten()
        return DenseBias(*self.bias_tables[0], self.model.relative_bias.max_positions, times, self.bucket_edges)

    def _bias_of(self, layer: int, batch: Batch) -> DenseBias | None:
        return batch.bias and batch.bias.for_layer(*self.bias_tables[layer])

    def _block(self, block: HSTUBlock, index: int, x: Tensor, batch: Batch) -> Tensor:
        """``HSTUBlock.forward``; float [B * (n + k), d], changed in place."""
        merged = self.uvqk[index].silu(self._normal_input(index, x, batch.types))
        u, v, q, k = merged.split(block.split, dim=-1)
        q, k, v = (part.unflatten(-1, (block.num_heads, -1)) for part in (q, k, v))
        attended = self._attend(block, index, q, k, v, batch)
        norm = block.output_norm
        arguments = attended.flatten(1), batch.types, norm.gain, norm.bias, self.attended_epsilon, u
        output = self.output[index]
        if self.is_fp8:
            return output.add_to(x, fp8_group_norm(*arguments, by_row=output.takes_rows(len(x))))
        return output.add_to(x, gated_group_norm(*arguments))

    def _normal_input(self, index: int, x: Tensor, types: Tensor) -> Tensor | QuantisedRows:
        norm = self.blocks[index].input_norm
        if self.is_fp8:
            by_row = self.uvqk[index].takes_rows(len(x))
            return fp8_group_norm(x, types, norm.gain, norm.bias, norm.epsilon, by_row=by_row)
        return _normalised(norm, x, types, self.shifts[index])

    def _last_block(self, x: Tensor, batch: Batch, pick: Pick) -> Tensor:
        """The last block for picked tokens alone, float [B * m, d]: of all others only keys and values are needed.

        Args:
            x: Float [B * (n + k), d].
            batch: What blocks share.
            pick: [B, m, any] of [B, n + k, any]: tokens that see all of the context.
        """
        block, (size, n, k) = self.blocks[-1], batch.shape
        tokens = (size, n + k, -1)
        normal = _normalised(block.input_norm, x, batch.types, self.shifts[-2])
        picked = pick(normal.view(tokens)).flatten(0, 1)
        if k and batch.visible is None:
            u = self.last_u.silu(picked)
            attended = pick(self._candidates_attend(normal, batch).view(tokens)).flatten(0, 1)
        else:
            u, q = self.last_uq.silu(picked).split(block.split[::2], dim=-1)
            attended = self._picked_attend(normal, q, batch, pick)
        types = pick(batch.types.view(tokens)).flatten()
        norm = block.output_norm
        gated = gated_group_norm(attended, types, norm.gain, norm.bias, self.attended_epsilon, u)
        return self.output[-1].add_to(pick(x.view(tokens)).flatten(0, 1).contiguous(), gated)

    def _candidates_attend(self, normal: Tensor, batch: Batch) -> Tensor:
        """A V / ``divisor`` of the last block by the kernel; on a GPU rows of context tokens hold nothing."""
        block, (_, n, k) = self.blocks[-1], batch.shape
        merged = self.last_vqk.silu(normal)
        v, q, key = (part.unflatten(-1, (block.num_heads, -1)) for part in merged.split(block.split[1:], dim=-1))
        out = torch.empty(q.shape, dtype=self.dtype, device=q.device)
        # A longest context of 0 leaves no context token to attend for; as keys they are there all the same.
        segments = Segments(batch.segments.sequences, 0, k, 0, k)
        has_bias = batch.bias is not None
        config = choose(DenseKey(block.dqk, self.dtype, capability_of(q.device), length_class(n), has_bias))
        bias = self._bias_of(-1, batch)
        return dense_attention(
            q, key, v, out, segments, scale=block.dqk**-0.5, norm_length=self.divisor, bias=bias, config=config
        )

    def _picked_attend(self, normal: Tensor, q: Tensor, batch: Batch, pick: Pick) -> Tensor:
        """The same by PyTorch, float [B * m, h dv], for q [B * m, h dqk]."""
        block, (size, n, k) = self.blocks[-1], batch.shape
        tokens = (size, n + k, -1)
        v, key = (
            block.by_head(part.view(tokens)) for part in self.last_vk.silu(normal).split(block.split[1::2], dim=-1)
        )
        q = block.by_head(q.view(size, q.shape[0] // size, -1)) * block.dqk**-0.5
        visible = (batch.types.view(tokens)[:, None, None, :n, 0] != TokenType.PADDING).to(q.dtype)
        bias = self._picked_bias(batch, pick)
        attended = block.attend(q, key[:, :, :n], v[:, :, :n], visible, bias)
        if k:
            self_bias = batch.self_biases[-1] if batch.self_biases else None
            attended += block.attend_self(q, key[:, :, n:], v[:, :, n:], self_bias)
        return attended.transpose(1, 2).float().div_(self.divisor).flatten(0, 1).flatten(1)

    def _picked_bias(self, batch: Batch, pick: Pick) -> Tensor | None:
        """Relative bias of picked tokens in the last block, float [B, 1, m, n], or None."""
        layer, (size, n, k) = self._bias_of(-1, batch), batch.shape
        if layer is None:
            return pick(batch.biases[-1].squeeze(1)).unsqueeze(1) if batch.biases else None
        positions = torch.arange(n + k, device=layer.times.device).expand(size, -1)
        times = layer.times.view(size, n + k)
        picked = [pick(part.unsqueeze(-1)).squeeze(-1) for part in (positions, times)]
        return layer.between(picked[0], picked[1], times[:, :n]).unsqueeze(1).to(self.dtype)

    def _attend(self, block: HSTUBlock, index: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """A V / ``divisor``, float [B * (n + k), H, dv]."""
        scale = block.dqk**-0.5
        if batch.visible is None:
            out = torch.empty(q.shape, dtype=self.dtype, device=q.device)
            bias = self._bias_of(index, batch)
            return dense_attention(q, k, v, out, batch.segments, scale=scale, norm_length=self.divisor, bias=bias)
        size, n, _ = batch.shape
        q, k, v = (part.unflatten(0, (size, -1)).transpose(1, 2) for part in (q * scale, k, v))
        logit_bias = batch.biases[index] if batch.biases else None
        self_bias = batch.self_biases[index] if batch.self_biases else None
        attended = block.attend(q, k[:, :, :n], v[:, :, :n], batch.visible, logit_bias)
        attended[:, :, n:] += block.attend_self(q[:, :, n:], k[:, :, n:], v[:, :, n:], self_bias)
        return attended.transpose(1, 2).float().div_(self.divisor).flatten(0, 1)


def _normalised(norm: GroupLayerNorm, x: Tensor, types: Tensor, shift: Tensor | None) -> Tensor:
    return group_norm(x, types, norm.gain, norm.bias, norm.epsilon, shift)


def _head_logits(heads: MMoEHeads | SharedBottomHeads, x: Tensor) -> Tensor:
    """Logits FP32 [..., T]; the towers come before the mixing, which they are linear in: no product of tiny matrices.

    A rare event's logits lie around -4, where BF16 steps by 1/32: more than the candidates of a user differ by. So what
    follows the wide products is FP32.
    """
    if isinstance(heads, SharedBottomHeads):
        hidden = F.silu(heads.bottom(x)).float()
        return F.linear(hidden, heads.towers.weight.float(), heads.towers.bias.float())
    experts = F.silu(heads.experts(x)).unflatten(-1, (heads.num_experts, heads.head_dim)).float()
    gates = heads.gates(x).float().unflatten(-1, (heads.num_tasks, heads.num_experts)).softmax(dim=-1)
    mixed: Tensor = (gates * (experts @ heads.tower.float().T).transpose(-1, -2)).sum(dim=-1)
    return mixed + heads.tower_bias.float()


def _shifts(outputs: list[Projection]) -> list[Tensor | None]:
    """What the residual stream lacks before each block and at the end, FP32 [d]: biases of the blocks so far.

    A product that adds to the stream in its place has no room for a bias; the norms, which read the stream, do.
    """
    shifts: list[Tensor | None] = [None]
    for output in outputs:
        before = shifts[-1]
        bias = output.bias.float()
        shifts.append(None if output.adds_bias else bias if before is None else before + bias)
    return shifts


def _bias_tables(relative: RelativeBias | None) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Each layer's tables of positions and of times, FP32 and contiguous, and where time buckets begin."""
    if relative is None:
        return [], None
    tables = (relative.position_table, relative.time_table)
    by_layer = (table.t().contiguous().unbind(0) for table in tables)
    edges = time_bucket_edges(relative.time_bucket, relative.time_buckets, relative.time_table.device)
    return list(zip(*by_layer, strict=True)), edges


def _converted(model: MTGR, dtype: torch.dtype) -> MTGR:
    """A copy in ``dtype``; tables whose entries are logits stay as they are, for they are looked up, not multiplied."""
    made = copy.deepcopy(model)
    if dtype == torch.float32:
        return made
    relative = made.relative_bias
    made.relative_bias = None
    wide = made.wide_terms
    del made.wide_terms
    made.to(dtype)
    made.wide_terms = wide
    made.relative_bias = relative
    return made
