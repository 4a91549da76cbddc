"""MTGR inside vLLM: paged keys and values, prefix reuse and continuous batching, with HSTU's attention."""

ARCHITECTURE = "MTGRForRecommendation"
MODEL_TYPE = "mtgr"
SCHEDULER = "mtgr.vllm_plugin.scheduler.ContextScheduler"
# Of a request's extra_kwargs: how many of its leading tokens are context, how many of these are static (profile and
# history), and how many candidates follow.
CONTEXT_TOKENS, STATIC_TOKENS, CANDIDATES = "context_tokens", "static_tokens", "candidates"
# Keys of additional_config: whether steps run as captured graphs, and what the blocks' weights are rounded to.
CUDA_GRAPHS, QUANTIZATION = "mtgr_cuda_graphs", "mtgr_quantization"


def register() -> None:
    """Entry point ``vllm.general_plugins``: make the architecture known, in every process of vLLM.

    Raises:
        ConfigurationError: If this version of vLLM is not one that the plugin was tested with.
    """
    from mtgr.vllm_plugin.orphans import end_with_parent
    from mtgr.vllm_plugin.versions import check_version

    end_with_parent()
    check_version()
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from mtgr.vllm_plugin.config import MTGRConfig

    AutoConfig.register(MODEL_TYPE, MTGRConfig, exist_ok=True)
    # By name: importing the model here would initialise CUDA in processes that must not.
    ModelRegistry.register_model(ARCHITECTURE, f"mtgr.vllm_plugin.model:{ARCHITECTURE}")
    # The engine looks it up when it starts; there is no option for it.
    from vllm.v1.engine import core

    from mtgr.vllm_plugin.hashing import page_hasher

    core.get_request_block_hasher = page_hasher
