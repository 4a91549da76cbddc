"""The MTGR network in PyTorch: the reference that every engine is measured against."""

from mtgr.model.mtgr import MTGR

__all__ = ["MTGR"]
