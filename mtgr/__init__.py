"""Serve MTGR, a generative recommender built of HSTU blocks, on NVIDIA Triton Inference Server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtgr.engines.vllm import VLLMEngine, VLLMEngineConfig
    from mtgr.pipeline import OptimizedInferencePipeline, PipelineConfig

__version__ = "0.1.0"
__all__ = ["OptimizedInferencePipeline", "PipelineConfig", "VLLMEngine", "VLLMEngineConfig", "__version__"]


def __getattr__(name: str) -> Any:
    # Clients and Triton's adapters import parts of this package where torch would cost seconds: load it when asked for.
    if name in ("OptimizedInferencePipeline", "PipelineConfig"):
        from mtgr import pipeline

        return getattr(pipeline, name)
    if name in ("VLLMEngine", "VLLMEngineConfig"):
        from mtgr.engines import vllm

        return getattr(vllm, name)
    raise AttributeError(f"module 'mtgr' has no attribute {name!r}")
