"""The policy: one file of settings for the whole service, by profile, validated, and read again while serving."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError
from mtgr.routing.admission import AdmissionConfig
from mtgr.routing.breaker import BreakerConfig
from mtgr.routing.choice import AutoConfig
from mtgr.routing.config import RoutingConfig
from mtgr.routing.experiment import DEFAULT_ARM, Arm, Experiment, Shadow
from mtgr.settings import build, read_yaml

PROFILES = ("dev", "test", "prod")
POLICY_VARIABLE = "MTGR_POLICY"
PROFILE_VARIABLE = "MTGR_PROFILE"
DEFAULT_PROFILE = "prod"
LOG_LEVELS = ("debug", "info", "warning", "error")

_DIRECTORY = Path(__file__).resolve().parent / "profiles"


@dataclass(frozen=True)
class LogConfig:
    """What is written to the server's log.

    Attributes:
        level: Least important level that is written; ``debug`` explains the way of every request.
        json: Whether lines are JSON objects, for collectors, or text for readers.
    """

    level: str = "info"
    json: bool = True

    def __post_init__(self) -> None:
        """Check the level.

        Raises:
            ConfigurationError: If it is unknown.
        """
        if self.level not in LOG_LEVELS:
            raise ConfigurationError(f"log: level is {self.level!r}; it must be one of {', '.join(LOG_LEVELS)}.")


@dataclass(frozen=True)
class Policy:
    """Settings of the whole service.

    Attributes:
        profile: ``dev``, ``test`` or ``prod``.
        monitoring: Whether the models report on the metrics page.
        alerting: Whether alert rules may fire; they look at ``mtgr_alerting``.
        timed_run_seconds: Time after which a server started with ``python -m mtgr.serving`` ends by itself; None never.
        deadline_seconds: For requests that bring no time limit.
        log: The log.
        auto: Which engine serves.
        routing: Ranking, and calls to engines.
        admission: How many requests run and wait.
        breaker: When an engine is left alone.
        experiment: Arms, or None.
        shadow: Calls beside the answer, or None.
    """

    profile: str
    monitoring: bool = True
    alerting: bool = True
    timed_run_seconds: float | None = None
    deadline_seconds: float = 10.0
    log: LogConfig = field(default_factory=LogConfig)
    auto: AutoConfig = field(default_factory=AutoConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    experiment: Experiment | None = None
    shadow: Shadow | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: If one is out of range.
        """
        if self.profile not in PROFILES:
            raise ConfigurationError(f"profile is {self.profile!r}; it must be one of {', '.join(PROFILES)}.")
        for name in ("timed_run_seconds", "deadline_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigurationError(f"{name} is {value}; it must be positive.")

    def arm(self, user_id: str) -> str:
        """Name of the arm that a user is in; ``default`` without an experiment."""
        return DEFAULT_ARM if self.experiment is None else self.experiment.assign(user_id).name

    def arm_settings(self, name: str) -> Arm | None:
        """The arm of this name; None for ``default``, and for one that a reload has taken away."""
        return None if self.experiment is None else self.experiment.arm(name)


def load_profile(name: str) -> Policy:
    """A profile as it comes with the package.

    Raises:
        ConfigurationError: If there is none of this name.
    """
    return _policy(read_yaml(profile_path(name)), f"profile {name}")


def load_policy(path: Path) -> Policy:
    """A user's file: ``extends: prod`` names the profile that holds whatever the file does not say.

    Sections are completed setting by setting; lists, weights of tasks, and arms are taken as they stand.

    Raises:
        ConfigurationError: If the file is missing or too large, is no YAML mapping, or has an unknown key or a wrong
            value; the message names the file, the key, and what is allowed.
    """
    values = read_yaml(path)
    base = values.pop("extends", DEFAULT_PROFILE)
    if base not in PROFILES:
        raise ConfigurationError(f"{path}: extends is {str(base)[:60]!r}; it must be one of {', '.join(PROFILES)}.")
    return _policy(values, str(path), load_profile(str(base)))


def policy_file(parameters: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> Path:
    """The file to read: a user's, named by ``MTGR_POLICY`` or the parameter ``policy``, or a profile's.

    Raises:
        ConfigurationError: If a parameter is unknown or a profile does not exist.
    """
    unknown = sorted(parameters.keys() - {"policy", "profile"})
    if unknown:
        raise ConfigurationError(f"unknown parameter {unknown[0]!r}; it must be policy or profile.")
    path = environment.get(POLICY_VARIABLE) or parameters.get("policy")
    if path:
        return Path(path)
    return profile_path(environment.get(PROFILE_VARIABLE) or parameters.get("profile") or DEFAULT_PROFILE)


def profile_path(name: str) -> Path:
    """File of a profile.

    Raises:
        ConfigurationError: If there is none of this name.
    """
    if name not in PROFILES:
        raise ConfigurationError(f"profile is {name!r}; it must be one of {', '.join(PROFILES)}.")
    return _DIRECTORY / f"{name}.yaml"


def _policy(values: Mapping[str, Any], source: str, base: Policy | None = None) -> Policy:
    try:
        return build(Policy, values, base)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {error}") from error
