"""``tritonserver`` as a command of the virtual environment: execs the server with its environment and backends."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from mtgr.errors import ConfigurationError, MTGRError
from mtgr.serving.command import server_command
from mtgr.serving.find import LAUNCHER_MARK, find_installation, find_native, is_launcher


def install_launcher(target: Path | None = None) -> str:
    """Write the ``tritonserver`` command into the virtual environment, unless there is a native server.

    Args:
        target: The script to write; ``tritonserver`` beside the interpreter by default.

    Returns:
        A sentence that says what was done.

    Raises:
        ConfigurationError: If a file that this package did not write stands there.
        UnavailableError: If there is no server to launch.
    """
    native = find_native()
    if native is not None:
        return f"{native.binary} is a native tritonserver: use it as it is; no launcher was written."
    server_command(find_installation())  # says now what would be missing at the first start
    target = target or Path(sys.prefix) / "bin" / "tritonserver"
    if target.exists() and not is_launcher(target):
        raise ConfigurationError(f"{target} exists and is not this package's launcher; move it away first.")
    # The interpreter sets the server up at every start, so that a changed stand-in or a new wheel is taken up.
    script = (
        "#!/bin/sh\n"
        "# Starts the tritonserver of the nvidia-pytriton wheel.\n"
        # -P: the command works from any directory, whatever Python files lie there.
        f'exec {shlex.quote(sys.executable)} -P -m {LAUNCHER_MARK} "$@"\n'
    )
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(script, encoding="utf-8")
    temporary.chmod(0o755)
    temporary.replace(target)
    return f"wrote {target}: with this environment active, `tritonserver --model-repository model_repository` works."


def main(arguments: list[str]) -> NoReturn:
    """Become tritonserver, or exit with the sentence that says why not."""
    try:
        command, environment = server_command(find_installation())
    except MTGRError as error:
        sys.exit(f"tritonserver: {error}")
    os.execve(command[0], [*command, *_loopback(arguments), *arguments], environment)


def _loopback(arguments: list[str]) -> list[str]:
    """Flags that keep the server on this machine, for the addresses that the caller leaves open."""
    given = {argument.split("=", 1)[0] for argument in arguments}
    flags = (f"--{name}-address" for name in ("http", "grpc", "metrics"))
    return [f"{flag}=127.0.0.1" for flag in flags if flag not in given]


if __name__ == "__main__":
    main(sys.argv[1:])
