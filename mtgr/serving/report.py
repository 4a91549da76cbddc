"""The table of strategies that a start prints: which are ready, on what, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtgr.bundle import load_bundle
from mtgr.errors import ConfigurationError
from mtgr.files import read_json
from mtgr.routing.readiness import artifact_problem
from mtgr.routing.strategies import AUTO, STRATEGIES, Strategy
from mtgr.serving.management import serving_policy
from mtgr.serving.server import ModelStatus, summary

_COLUMNS = ("strategy", "models", "precision", "checkpoint", "max error", "status")
_HASH_CHARS = 12


@dataclass(frozen=True)
class StrategyReport:
    """One strategy on a running server.

    Attributes:
        name: The strategy.
        ready: Whether a request may ask for it.
        models: Its models with their versions, for example ``mtgr_vllm 1``; empty if it is not exported.
        precision: Of the artifacts' manifests; empty without one.
        checkpoint: The first characters of the checkpoint's hash.
        max_error: Largest absolute difference from the reference, measured at export.
        status: ``ready``, or why not.
    """

    name: str
    ready: bool
    models: str
    precision: str
    checkpoint: str
    max_error: str
    status: str


def strategy_reports(model_repository: Path, models: Sequence[ModelStatus]) -> list[StrategyReport]:
    """Judge every strategy by the server's index and the artifacts' manifests.

    Args:
        model_repository: The repository's directory.
        models: The server's index.
    """
    try:
        schema_hash = load_bundle(model_repository).schema.hash
    except ConfigurationError:
        schema_hash = None  # a repository of engines alone, or none exported yet
    return [_report(strategy, model_repository, models, schema_hash) for strategy in STRATEGIES.values()]


def format_reports(reports: Sequence[StrategyReport], order: Sequence[str] | None = None) -> str:
    """The reports as aligned text, with a last line on what ``auto`` would use.

    Args:
        reports: The reports.
        order: The policy's order of strategies; by default that of the policy which this environment names.

    Raises:
        ConfigurationError: If no order is given and that policy is wrong.
    """
    order = serving_policy(None).auto.order if order is None else order
    rows = [_COLUMNS] + [
        (r.name, r.models or "-", r.precision or "-", r.checkpoint or "-", r.max_error or "-", r.status)
        for r in reports
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ready = {report.name for report in reports if report.ready}
    first = next((name for name in order if name in ready), None)
    remedy = STRATEGIES[order[-1]].remedy
    lines.append(f"{AUTO}: {first} serves first" if first else f"{AUTO}: no engine is ready; {remedy}")
    return "\n".join(lines)


def _report(
    strategy: Strategy, model_repository: Path, models: Sequence[ModelStatus], schema_hash: str | None
) -> StrategyReport:
    absent = [name for name in strategy.models if not (model_repository / name).is_dir()]
    if absent:
        status = f"not exported: {strategy.remedy}"
        return StrategyReport(strategy.name, False, "", "", "", "", status)
    ready = {name: _versions(name, models, only_ready=True) for name in strategy.models}
    failures = [_failure(name, models) for name in strategy.models if not ready[name]]
    if not failures and schema_hash is not None:
        # The router's own judgement, so that the table never promises what it would refuse.
        problems = (artifact_problem(model_repository, name, schema_hash) for name in strategy.models)
        failures = [problem for problem in problems if problem is not None]
    shown = ready if not failures else {name: _versions(name, models) for name in strategy.models}
    manifests: list[dict[str, Any]] = []
    status = f"failed: {'; '.join(failures)}" if failures else "ready"
    for name, versions in shown.items():
        for version in versions:
            path = model_repository / name / version / "manifest.json"
            if not path.is_file():
                continue
            try:
                manifests.append(_manifest(path))
            except ConfigurationError as error:
                status += f" ({error})"
    return StrategyReport(
        name=strategy.name,
        ready=not failures,
        models=", ".join(f"{name} {'/'.join(versions)}".rstrip() for name, versions in shown.items()),
        precision=_joined(manifest.get("precision") for manifest in manifests),
        checkpoint=_joined(str(manifest.get("checkpoint") or "")[:_HASH_CHARS] for manifest in manifests),
        max_error=_max_error(manifests),
        status=status,
    )


def _versions(name: str, models: Sequence[ModelStatus], only_ready: bool = False) -> list[str]:
    found = {m.version for m in models if m.name == name and m.version and (m.ready or not only_ready)}
    return sorted(found, key=lambda version: (len(version), version))


def _failure(name: str, models: Sequence[ModelStatus]) -> str:
    reason = next((summary(model.reason) for model in models if model.name == name and model.reason), "")
    return f"{name}: {reason or 'the server did not take it up'}"


def _manifest(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} is not a JSON object.")
    return value


def _joined(values: Iterable[Any]) -> str:
    """The distinct values, most often one: the models of a strategy come from the same checkpoint."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def _max_error(manifests: Sequence[dict[str, Any]]) -> str:
    errors = [
        parity["max_abs_error"]
        for manifest in manifests
        if isinstance(parity := manifest.get("parity"), dict) and isinstance(parity.get("max_abs_error"), int | float)
    ]
    return f"{max(errors):.1e}" if errors else ""
