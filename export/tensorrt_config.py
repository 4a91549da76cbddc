"""Fit a model's config.pbtxt to the plan that could be built: its profiles and its largest batch."""

from __future__ import annotations

import re
from pathlib import Path

from mtgr.manifest import Manifest

ALONE_INSTANCES = 4  # of a plan that takes one request at a time


def fit_config(config: Path, manifest: Manifest) -> None:
    """Change ``max_batch_size``, profiles, instances, CUDA graphs and warm-up where the plan differs from the template.

    Args:
        config: Of the model, from its template; no change if the plan has what the template says.
        manifest: Of the plan.
    """
    text = config.read_text(encoding="utf-8")
    fitted = fitted_text(text, len(manifest.details["profiles"]), manifest.details["options"]["max_batch"])
    if fitted != text:
        config.write_text(fitted, encoding="utf-8")


def fitted_text(text: str, profiles: int, max_batch: int) -> str:
    """``text`` for a plan of so many optimization profiles that takes batches of up to ``max_batch``."""
    names = ", ".join(f'"{index}"' for index in range(profiles))
    text = re.sub(r"^max_batch_size: \d+", f"max_batch_size: {max_batch}", text, flags=re.MULTILINE)
    text = re.sub(r" profile: \[[^\]]*\]", f" profile: [ {names} ]" if profiles > 1 else ' profile: [ "0" ]', text)
    if max_batch > 1:
        return text
    text = re.sub(r"(instance_group \[ \{ count:) \d+", rf"\1 {ALONE_INSTANCES}", text)
    # Shapes of batches.
    text = re.sub(r"^    graph_spec \{\n      batch_size: (?!1\n)\d+\n.*?^    \}\n", "", text, flags=re.M | re.S)
    return re.sub(r",\n  \{\n    name: \"\w+\"\n    batch_size: (?!1\n)\d+\n.*?^  \}", "", text, flags=re.M | re.S)
