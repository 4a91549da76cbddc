"""What a server's metrics page says."""

from __future__ import annotations

import re
import urllib.request


def counters(metrics_url: str, *names: str) -> tuple[float, ...]:
    """Values of metrics without labels of their own, in the order of ``names``; 0 of one that is not there yet."""
    with urllib.request.urlopen(metrics_url) as response:
        text = response.read().decode()
    found = [re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE) for name in names]
    return tuple(float(match[1]) if match else 0.0 for match in found)


def context_tokens(metrics_url: str) -> tuple[float, ...]:
    """Context tokens that vLLM had so far, and those of them that it found in its cache."""
    return counters(metrics_url, "mtgr_vllm_context_tokens_total", "mtgr_vllm_prefix_hit_tokens_total")
