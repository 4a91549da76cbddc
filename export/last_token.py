"""How a retrieval graph computes the output of the last context token. Needs no PyTorch."""

from __future__ import annotations

from typing import Literal

LastToken = Literal["products", "sums", "rows", "company"]
"""
``products`` is what costs least: matrix products of one row. ``sums`` writes the attention of that row as elementwise
products and sums, and ``rows`` computes the last block and the query for all tokens, as ranking does, and picks the row
at the very end: for a TensorRT that cannot build attention with a single query. ``company`` does so in ranking's very
network, with two blank candidates that nobody sees: for one that builds that network and no other.
"""
