"""Find, assemble, start and stop a Triton server on a model repository."""

from mtgr.serving.find import Installation, find_installation
from mtgr.serving.server import DOOR_MODELS, ModelStatus, TritonServer

__all__ = ["DOOR_MODELS", "Installation", "ModelStatus", "TritonServer", "find_installation"]
