"""Public checkpoint formats: how each is recognised, and how its tensors fill a network of ``mtgr.compat``."""

from __future__ import annotations

from mtgr.compat.convert import ConversionReport, Plan, convert
from mtgr.compat.formats import meta_research, nvidia, stu
from mtgr.compat.formats.format import Format
from mtgr.compat.options import Options
from mtgr.compat.tensors import ForeignTensors
from mtgr.errors import ConfigurationError

FORMATS: dict[str, Format] = {
    entry.name: entry for entry in (meta_research.FORMAT, stu.DLRM_V3, stu.TORCH_EASY_REC, nvidia.FORMAT)
}


def detect(tensors: ForeignTensors) -> Format:
    """The format of a checkpoint, by the names of its tensors.

    Raises:
        ConfigurationError: If it is none of those that are known.
    """
    found = [entry for entry in FORMATS.values() if entry.matches(tensors.values)]
    if len(found) != 1:
        shown = ", ".join(sorted(tensors.values)[:3])
        raise ConfigurationError(
            f"the format of {', '.join(tensors.files)} is not known: its tensors are called {shown}, ...; "
            f"known are {', '.join(FORMATS)}."
        )
    return found[0]


def convert_tensors(source: str, tensors: ForeignTensors, options: Options) -> tuple[Plan, ConversionReport]:
    """Detect and convert; the plan's network is filled.

    Raises:
        ConfigurationError: If the format is not known, an option is missing or wrong, or a tensor does not fit.
    """
    entry = detect(tensors)
    plan = entry.plan(tensors, options)
    options.finish(entry.name)
    return plan, convert(entry.name, source, tensors, plan)
