"""HSTU attention over vLLM's paged cache.

The layers here stand beside vLLM's own ``Attention``: what they share with it is the cache manager, which allocates
their pages and says where each token's keys and values go. Kernels: ``mtgr.kernels``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from mtgr.kernels.paged_attention import PagedBias, StepItems, paged_attention
from mtgr.kernels.store import activate_and_store, clear_padding, store_keys_values, store_times
from mtgr.vllm_plugin.step import StepMetadata


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Keeps of vLLM's metadata what the kernels read: everything lies on the device and nothing is computed."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """The metadata of a step; every layer gets the same."""
        common = common_attn_metadata
        return StepMetadata(
            common.num_actual_tokens, common.query_start_loc, common.block_table_tensor, common.slot_mapping
        )


class HSTUBackend(AttentionBackend):
    """Layout of the pages: keys and values of a head side by side."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """Name among vLLM's backends: the one kept for others' backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl[Any]]:
        """Not there: the layers below attend themselves."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        """What builds a step's metadata."""
        return StepMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """[num_blocks, H, block_size, 2 D]: also the one layout that newer versions of vLLM have."""
        return (num_blocks, num_kv_heads, block_size, 2 * head_size)

    @staticmethod
    def use_cascade_attention(*args: Any, **kwargs: Any) -> bool:
        """Never: contexts of different users share no prefix."""
        return False


class _PagedLayer(nn.Module, AttentionLayerBase):
    """A layer with pages of its own.

    Args:
        name: Unique, with one number in it, by which vLLM orders caches.
    """

    kv_cache: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.kv_cache = torch.empty(0)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"there are two layers {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The layout."""
        return HSTUBackend

    def metadata(self) -> StepMetadata | None:
        """The step's metadata; None where vLLM only measures memory, before there is a cache."""
        every = get_forward_context().attn_metadata
        if every is None:
            return None
        metadata: StepMetadata = every[self.name]
        return metadata


@dataclass(frozen=True)
class Step:
    """What all layers of a step share.

    Attributes:
        metadata: Of the cache manager; None without a cache.
        is_candidate: BOOL [T].
        visible: INT32 [T], leading tokens of its sequence that a token sees.
        slots: INT64 [T], as the metadata's, negative for candidates too: nobody else ever reads their keys.
        bias: Relative bias with the tables of any layer, or None.
        items: Lists of the step's tiles of queries.
    """

    metadata: StepMetadata | None
    is_candidate: Tensor
    visible: Tensor
    slots: Tensor | None
    bias: PagedBias | None
    items: StepItems = field(default_factory=StepItems)


class TokenTimes(_PagedLayer):
    """Times of cached tokens, which relative bias needs of keys: INT32, one of two per token used."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One head of one number, twice."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=1, dtype=torch.int32
        )

    def store(self, times: Tensor, slots: Tensor) -> Tensor:
        """Keep the times, INT32 [T], of a step; returns the cache, INT32 [num_blocks, block_size]."""
        cache = self.kv_cache[:, 0, :, 0]
        store_times(times, cache, slots)
        return cache


class PagedAttention(_PagedLayer):
    """Attention of one block.

    Args:
        name: Name of the layer.
        num_heads: Heads, H.
        head_size: Width of queries, keys and values, D.
        norm_length: The constant N.
        dtype: Precision of keys and values.
    """

    def __init__(self, name: str, num_heads: int, head_size: int, norm_length: int, dtype: torch.dtype) -> None:
        super().__init__(name)
        self.num_heads = num_heads
        self.head_size = head_size
        self.norm_length = norm_length
        self.dtype = dtype
        # What a single token attends to, divided by N, would underflow in FP16.
        self.out_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Keys and values of every head."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_heads,
            head_size=self.head_size,
            dtype=self.dtype,
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, step: Step, bias: PagedBias | None, is_raw: bool = False
    ) -> Tensor:
        """Attend.

        Args:
            q: Float [T, H, D].
            k: Float [T, H, D].
            v: Float [T, H, D].
            step: What layers share.
            bias: Relative bias of this layer, or None.
            is_raw: Whether q, k and v still have to go through SiLU, which then changes them in place.

        Returns:
            [T, H, D] in ``out_dtype``, divided by N; zeros in rows of no request.
        """
        metadata = step.metadata
        if metadata is None or step.slots is None:
            return torch.zeros(q.shape, dtype=self.out_dtype, device=q.device)
        out = torch.empty(q.shape, dtype=self.out_dtype, device=q.device)
        # Nobody writes the rows of a graph's padding, and the next layer makes keys and values of them, which a tile of
        # the last request's candidates reaches into: weights of 0 would not keep a NaN of old memory out.
        clear_padding(out, metadata.query_start)
        if is_raw:
            activate_and_store(q, k, v, self.kv_cache, step.slots)
        else:
            store_keys_values(k, v, self.kv_cache, step.slots)
        return paged_attention(
            q,
            k,
            v,
            self.kv_cache,
            metadata.block_table,
            metadata.query_start,
            step.visible,
            step.is_candidate,
            out,
            scale=self.head_size**-0.5,
            norm_length=self.norm_length,
            bias=bias,
            items=step.items,
        )
