"""From users and items to token rows."""

from mtgr.features.candidates import candidate_rows
from mtgr.features.catalog import ItemCatalog, build_catalog
from mtgr.features.context import context_rows
from mtgr.features.state import CandidateState, build_candidate_state

__all__ = [
    "CandidateState",
    "ItemCatalog",
    "build_candidate_state",
    "build_catalog",
    "candidate_rows",
    "context_rows",
]
