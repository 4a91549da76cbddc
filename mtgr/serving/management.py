"""Who may manage a server: outside the profile ``dev`` its management endpoints ask for a key.

``docs/security.md`` says what each of them could do to a server. Triton calls them protocols (gRPC) and APIs (HTTP).
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError
from mtgr.routing.policy import POLICY_VARIABLE, PROFILE_VARIABLE, Policy, load_policy, policy_file
from mtgr.serving.command import ADMIN_KEY_VARIABLE
from mtgr.serving.server import TritonServer

ADMIN_KEY_FILE_VARIABLE = "MTGR_ADMIN_KEY_FILE"
OPEN_PROFILE = "dev"
# What changes a server or reads its memory. The rest is what clients, probes, and load generators ask.
RESTRICTED = ("model-repository", "shared-memory", "trace", "logging")
HTTP_HEADER = "mtgr-admin-key"
GRPC_HEADER = f"triton-grpc-protocol-{HTTP_HEADER}"

_FLAGS = ("--http-restricted-api", "--grpc-restricted-protocol")
# Triton splits the flag at ',', ':' and '='.
_KEY = re.compile(r"[A-Za-z0-9_-]{16,256}")


def serving_policy(chosen: str | None, environment: Mapping[str, str] = os.environ) -> Policy:
    """The policy of a server that is started in this environment.

    The parameters in ``config.pbtxt`` are not looked at: they come last, and to miss a ``dev`` there keeps the server
    restricted.

    Args:
        chosen: What the command line says, as if ``MTGR_PROFILE`` said it; None for nothing.
        environment: Where ``MTGR_POLICY`` and ``MTGR_PROFILE`` are looked up.

    Raises:
        ConfigurationError: If there is no such profile, or the policy is wrong or of another profile than ``chosen``.
    """
    given = dict(environment) if chosen is None else {**environment, PROFILE_VARIABLE: chosen}
    path = policy_file({}, given)
    policy = load_policy(path)
    if chosen is not None and policy.profile != chosen:
        raise ConfigurationError(
            f"the profile {chosen} was asked for, but {POLICY_VARIABLE} names {path}, whose profile is "
            f"{policy.profile}: leave one of them out."
        )
    return policy


def admin_key(environment: Mapping[str, str] = os.environ) -> str:
    """The key of the management endpoints: from ``MTGR_ADMIN_KEY``, a file, or made up for this start.

    Raises:
        ConfigurationError: If the file cannot be read or the key is no key; the message does not contain it.
    """
    source, key = ADMIN_KEY_VARIABLE, environment.get(ADMIN_KEY_VARIABLE, "")
    path = environment.get(ADMIN_KEY_FILE_VARIABLE)
    if not key and path:
        source = path
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ConfigurationError(
                f"{ADMIN_KEY_FILE_VARIABLE} names {path}, which cannot be read: {reason}."
            ) from None
    elif not key:
        return secrets.token_hex(32)
    if not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"the key in {source} is no admin key; give 16 to 256 letters, digits, '-' or '_', "
            'such as `python -c "import secrets; print(secrets.token_hex(32))"` prints.'
        )
    return key


class RestrictedServer(TritonServer):
    """A server whose management endpoints (:data:`RESTRICTED`) answer only who sends the key.

    Args:
        model_repository: The repository's directory.
        key: What the header :data:`HTTP_HEADER` or :data:`GRPC_HEADER` must hold; see :func:`admin_key`.
        extra_args: More arguments for tritonserver.
        options: The other arguments of :class:`TritonServer`.

    Raises:
        ConfigurationError: If an argument restricts endpoints by a key of its own.
    """

    def __init__(
        self, model_repository: Path | str, *, key: str, extra_args: Sequence[str] = (), **options: Any
    ) -> None:
        for argument in extra_args:
            flag = argument.split("=", 1)[0]
            if flag in _FLAGS:
                raise ConfigurationError(
                    f"{flag} cannot be passed on to tritonserver: this launcher sets it; with --allow-management it "
                    "leaves that to you."
                )
        flags = [f"{flag}={','.join(RESTRICTED)}:{HTTP_HEADER}={key}" for flag in _FLAGS]
        super().__init__(model_repository, extra_args=[*flags, *extra_args], **options)
        # The index of models is behind the key too.
        self._headers = {HTTP_HEADER: key}
