"""``python -m mtgr.serving``: find or assemble a server, start it, and print what it can serve."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from mtgr.errors import MTGRError
from mtgr.routing.policy import PROFILE_VARIABLE, PROFILES
from mtgr.routing.strategies import STRATEGIES
from mtgr.serving.health import HealthServer
from mtgr.serving.launcher import install_launcher
from mtgr.serving.management import HTTP_HEADER, OPEN_PROFILE, RestrictedServer, admin_key, serving_policy
from mtgr.serving.ports import resolve_host
from mtgr.serving.report import format_reports, strategy_reports
from mtgr.serving.server import TritonServer

_STANDARD_OUTPUT = Path("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 after Ctrl-C or SIGTERM, 1 if the server could not start or died.
    """
    options = _parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        if options.install_launcher:
            print(install_launcher())
            return 0
        _serve(options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 0
    except MTGRError as error:
        print(f"mtgr.serving: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(options: argparse.Namespace) -> None:
    policy = serving_policy(options.profile)
    settings = {
        "host": options.host,
        "http_port": options.http_port,
        "grpc_port": options.grpc_port,
        "metrics_port": options.metrics_port,
        "extra_args": options.extra_args,
        "environment": {PROFILE_VARIABLE: options.profile} if options.profile else {},
        "log": None if options.log == _STANDARD_OUTPUT else options.log,
        "output": sys.stdout.buffer if options.log == _STANDARD_OUTPUT else None,
        "startup_timeout": options.startup_timeout,
        "tritonserver": options.tritonserver,
    }
    server: TritonServer
    if options.allow_management or policy.profile == OPEN_PROFILE:
        management = "open to every caller"
        server = TritonServer(options.model_repository, **settings)
    else:
        key = admin_key()
        management = f"restricted, header {HTTP_HEADER}" + (f": {key}" if options.show_admin_key else "")
        server = RestrictedServer(options.model_repository, key=key, **settings)
    with ExitStack() as stack:
        health = None
        if options.health_port is not None:
            health = HealthServer(resolve_host(options.host), options.health_port, strategy=options.health_strategy)
            stack.enter_context(health)
        stack.enter_context(server)
        if health is not None:
            health.watch(server.http_url)
            stack.callback(health.health.leave)  # before the server stops
        print(f"gRPC     {server.grpc_url}")
        print(f"HTTP     {server.http_url}")
        print(f"metrics  {server.metrics_url}")
        print(f"log      {server.log_path}")
        print(f"profile  {policy.profile}, management {management}")
        print()
        reports = strategy_reports(server.model_repository, server.models())
        print(format_reports(reports, policy.auto.order), flush=True)
        if policy.timed_run_seconds is not None:
            print(
                f"\nRuns of this profile are timed: the server stops after {policy.timed_run_seconds:g} s.", flush=True
            )
        server.wait(policy.timed_run_seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtgr.serving", description=__doc__)
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--http-port", type=_port, default=8000, help="0 picks a free port, as for the other two")
    parser.add_argument("--grpc-port", type=_port, default=8001)
    parser.add_argument("--metrics-port", type=_port, default=8002)
    parser.add_argument("--tritonserver", type=Path, help="the executable (default: MTGR_TRITONSERVER, or found)")
    parser.add_argument(
        "--log", type=Path, help="file for the server's output, - for standard output (default: a temporary file)"
    )
    parser.add_argument(
        "--health-port",
        type=_port,
        help="where /startup, /live and /ready answer an orchestrator (default: nowhere)",
    )
    parser.add_argument(
        "--health-strategy", choices=STRATEGIES, help="the engine that must answer for these to say yes (default: any)"
    )
    parser.add_argument(
        "--profile", choices=PROFILES, help="of the policy (default: MTGR_POLICY, MTGR_PROFILE, or prod)"
    )
    parser.add_argument(
        "--allow-management",
        action="store_true",
        help="ask no key for model loading, shared memory, trace and log settings (as in the profile dev)",
    )
    parser.add_argument(
        "--show-admin-key", action="store_true", help="print that key (of MTGR_ADMIN_KEY, its _FILE, or made up)"
    )
    parser.add_argument("--startup-timeout", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument(
        "--install-launcher", action="store_true", help="write the command `tritonserver` into this environment"
    )
    parser.add_argument("extra_args", nargs="*", metavar="-- ARGUMENT", help="more arguments for tritonserver")
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; give a number from 0 to 65535")
    return value


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
