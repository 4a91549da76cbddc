"""Clients of the public door: typed requests in, typed recommendations out, one exception hierarchy.

    with MTGRClient() as client:
        top = client.recommend("196", top_k=10)

Needs ``pip install mtgr[client]``; the protocol's own packages are loaded when a client of it is made.
"""

from mtgr.client.aio import AsyncMTGRClient
from mtgr.client.settings import TLS
from mtgr.client.sync import MTGRClient
from mtgr.client.types import History, Recommendation, RecommendationRequest

__all__ = ["TLS", "AsyncMTGRClient", "History", "MTGRClient", "Recommendation", "RecommendationRequest"]
