"""Linear layers of the plugin's blocks in FP8."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mtgr.config import ModelConfig
from mtgr.kernels.linear import BLOCK, QuantisedRows, QuantisedWeight, fp8_linear, quantise_weight
from mtgr.kernels.linear_tuning import library_serves_fp8
from mtgr.model.bias import RelativeBias
from mtgr.model.hstu import HSTUBlock
from mtgr.model.mtgr import MTGR
from mtgr.schema import Schema

LINEARS = ("uvqk", "output")  # of a block, that FP8 is for


class FP8Linear(nn.Module):
    """x W^T + b with e4m3 operands: a scale for each 128 numbers of a token, and for each 128 x 128 of the weight.

    Args:
        inputs: Columns of x, K.
        outputs: Columns of the result, N.
        device: Where it lies.
        dtype: Precision of the bias and the result.
        by_row: Whether there is one scale for each token, and for each row of the weight, instead.
    """

    data: Tensor
    scales: Tensor

    def __init__(
        self, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype, by_row: bool = False
    ) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.by_row = by_row
        columns, rows = -(-inputs // BLOCK), -(-outputs // BLOCK)
        self.register_buffer("data", torch.empty(outputs, columns * BLOCK, dtype=torch.float8_e4m3fn, device=device))
        scales = (outputs, 1) if by_row else (rows, columns)
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device), requires_grad=False)

    def load(self, weight: Tensor) -> None:
        """Quantise a weight, float [N, K], where this layer lies; only this one stands there in full for a moment."""
        made = quantise_weight(weight.to(self.data.device), by_row=self.by_row)
        self.data.copy_(made.data)
        self.scales.copy_(made.scales)

    def forward(self, x: Tensor | QuantisedRows, is_silu: bool = False) -> Tensor:
        """Float [T, N] of x, float [T, K] or rows quantised already, through SiLU if asked for."""
        return fp8_linear(x, QuantisedWeight(self.data, self.scales, self.by_row), self.bias, is_silu=is_silu)


def fp8_network(config: ModelConfig, schema: Schema, num_features: int, is_whole: bool = True) -> MTGR:
    """A network whose blocks have ``FP8Linear`` layers, to be loaded: their weights never stand in full together.

    Ranks that share a network (``is_whole`` is false) have scales by block: a rank sees a part of a row.
    """
    network = MTGR(replace(config, num_layers=1), schema, num_features)
    network.config = config
    if config.relative_bias:
        network.relative_bias = RelativeBias(config.num_layers, config.max_positions, config.time_buckets)
    gain = network.output_norm.gain
    network.blocks = nn.ModuleList(
        _fp8_block(config, gain.device, gain.dtype, is_whole) for _ in range(config.num_layers)
    )
    return network


def _fp8_block(config: ModelConfig, device: torch.device, dtype: torch.dtype, is_whole: bool) -> HSTUBlock:
    with torch.device("meta"):
        block = HSTUBlock(config)
    for name in LINEARS:
        layer: nn.Linear = getattr(block, name)
        by_row = is_whole and library_serves_fp8(layer.out_features, device)
        setattr(block, name, FP8Linear(layer.in_features, layer.out_features, device, dtype, by_row))
    block.input_norm.to_empty(device=device)
    block.output_norm.to_empty(device=device)
    return block
