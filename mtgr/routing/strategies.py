"""The strategies a request may ask for and the Triton models each one needs."""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class Strategy:
    """One way to compute a ranking.

    Attributes:
        name: What a request says in its ``strategy`` input.
        rank_model: Triton model that scores candidates.
        retrieve_model: Triton model that recommends without candidates.
        padded: Whether the engine takes rows padded to a bucket (dense engines) or as they are.
        setup: What a user runs to install the engine.
    """

    name: str
    rank_model: str
    retrieve_model: str
    padded: bool
    setup: str

    @property
    def remedy(self) -> str:
        """What to do where the engine is missing, as the end of a sentence."""
        return f"run `{self.setup}`"

    @property
    def models(self) -> tuple[str, ...]:
        """The distinct Triton models, ranking first."""
        return tuple(dict.fromkeys((self.rank_model, self.retrieve_model)))


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("baseline", "mtgr_baseline", "mtgr_baseline", True, "make export"),
        Strategy("onnx", "mtgr_onnx_rank", "mtgr_onnx_retrieve", True, "make export"),
        Strategy("tensorrt", "mtgr_tensorrt_rank", "mtgr_tensorrt_retrieve", True, "make export"),
        Strategy("vllm", "mtgr_vllm", "mtgr_vllm", False, "make vllm export"),
    )
}

# Fastest first: how `auto` orders what it knows nothing else about.
AUTO_ORDER: tuple[str, ...] = ("tensorrt", "vllm", "onnx", "baseline")
