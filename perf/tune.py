"""``python -m perf.tune`` (``make tune``): which settings give more answers a second under a latency limit.

Settings are tried one after the other, each value on a server of its own beside the best one so far, measured in turns
under the same traffic. What a server bears is the most answers a second, over some numbers of callers, whose p99 stays
within the limit. A value is taken over when it wins every round, by 3% at the middle one. Two servers are up at a time:
memory, also that of a GPU, must do for both.

The result is a variant: a folder with a policy file and a model repository, whose artifacts are links to the installed
ones. Neither the installed configs nor the profiles are ever written.

    python -m perf.tune --strategy onnx --limit-ms 50 --out build/tuned
    MTGR_POLICY=build/tuned/policy.yaml python -m mtgr.serving --model-repository build/tuned/repository
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtgr.bundle import load_bundle
from mtgr.errors import ConfigurationError, MTGRError
from mtgr.files import write_json
from mtgr.routing.config import RoutingConfig
from mtgr.routing.policy import PROFILES, load_policy, profile_path
from mtgr.routing.strategies import AUTO, STRATEGIES
from mtgr.serving.server import DOOR_MODELS, TritonServer
from perf.load import Outcome, RawCaller, closed_loop, message, percentile
from perf.record import ROOT, describe
from perf.workload import WorkloadConfig, door_steps, stored_traffic

MIN_GAIN = 0.03
MAX_RUNNING, ENGINE_INSTANCES = "routing.max_running", "engine instances"
FINE_CANDIDATES = (16, 32, 64, 96, 128, 192, 256, 512, 1024)
_DENSE = ("mtgr_baseline", "mtgr_onnx_rank", "mtgr_onnx_retrieve")
_THREADS = {"mtgr_baseline": "threads", "mtgr_onnx_rank": "intra_op_thread_count", "mtgr_vllm": "threads"}

Value = int | tuple[int, ...] | None
Settings = Mapping[str, Value]


@dataclass(frozen=True)
class Knob:
    """One setting.

    Attributes:
        name: What it is called in reports.
        values: What to try, besides what is set.
        models: Whose config it changes; none for a setting of the policy.
        change: Gives a config's new text; None for a setting of the policy, section and key in ``name``.
        current: Reads what is set from a config's text.
    """

    name: str
    values: tuple[Value, ...]
    models: tuple[str, ...] = ()
    change: Callable[[str, Value], str] | None = None
    current: Callable[[str], Value] | None = None


@dataclass(frozen=True)
class Trial:
    """A value that was tried.

    Attributes:
        knob: The setting.
        before: Value of the best variant so far.
        value: The value tried.
        ratios: What it bears over what the best so far bears, one a round.
        borne: Answers a second of both, medians: before, tried.
        taken: Whether it is the best now.
        problem: Why it could not be measured; empty if it was.
    """

    knob: str
    before: Value
    value: Value
    ratios: tuple[float, ...]
    borne: tuple[float, float]
    taken: bool
    problem: str = ""

    @property
    def gain(self) -> float:
        """Median over the rounds; 0 is as before."""
        return statistics.median(self.ratios) - 1 if self.ratios else 0.0

    def __str__(self) -> str:
        what = f"{self.knob}: {_shown(self.before)} -> {_shown(self.value)}"
        if self.problem:
            return f"{what}: not measured: {self.problem}"
        spread = f"{min(self.ratios) - 1:+.1%} to {max(self.ratios) - 1:+.1%}"
        verdict = "taken over" if self.taken else "left"
        return f"{what}: {self.borne[0]:.1f} -> {self.borne[1]:.1f}/s, {self.gain:+.1%} ({spread}): {verdict}"


def knobs(cores: int) -> tuple[Knob, ...]:
    """What can be tuned on a machine with so many cores."""
    threads = tuple(count for count in (2, 4, 8, 16) if count <= cores)
    found = [
        Knob(MAX_RUNNING, (1, 2, 3)),
        Knob("routing.max_batch", (1, 8, 32)),
        Knob(ENGINE_INSTANCES, (1, 2), ("mtgr_baseline", "mtgr_onnx_rank"), set_instances, get_instances),
        Knob("door instances", (1, 2), ("mtgr_features", "mtgr_router"), set_instances, get_instances),
        Knob("engine batcher delay (us)", (None, 0, 500, 2000), _DENSE, set_delay, get_delay),
        Knob("engine threads", (1, *threads), tuple(_THREADS), set_threads, get_threads),
    ]
    # Where the policy names them, finer buckets pad less and merge less.
    known = {field.name for field in dataclasses.fields(RoutingConfig)}
    for name, values in (
        ("candidate_buckets", ((16, 64, 256, 1024), (16, 64, 128, 256, 512, 1024), FINE_CANDIDATES)),
        ("context_buckets", ((64, 128, 192, 256, 384, 512, 768, 1024, 1152, 1536, 2048), (128, 256, 512, 1024, 2048))),
    ):
        if name in known:
            found.append(Knob(f"routing.{name}", values))
    return tuple(found)


def set_instances(text: str, value: Value) -> str:
    """Serve a model by so many processes."""
    return _replaced(r"(instance_group \[ { count: )\d+", rf"\g<1>{value}", text, "instance_group")


def get_instances(text: str) -> Value:
    """Processes that serve a model."""
    return int(_found(r"instance_group \[ { count: (\d+)", text, "instance_group"))


def set_threads(text: str, value: Value) -> str:
    """Threads of an engine."""
    pattern = r'(key: "(?:threads|intra_op_thread_count)" value: { string_value: )"\d+"'
    return _replaced(pattern, rf'\g<1>"{value}"', text, "threads")


def get_threads(text: str) -> Value:
    """Threads of an engine."""
    pattern = r'key: "(?:threads|intra_op_thread_count)" value: { string_value: "(\d+)"'
    return int(_found(pattern, text, "threads"))


def set_delay(text: str, value: Value) -> str:
    """Most microseconds that Triton's batcher waits for company; None is without a batcher."""
    text = re.sub(r"^dynamic_batching {.*}\n", "", text, flags=re.MULTILINE)
    return text if value is None else f"{text}dynamic_batching {{ max_queue_delay_microseconds: {value} }}\n"


def get_delay(text: str) -> Value:
    """What ``set_delay`` sets."""
    found = re.search(r"^dynamic_batching {(?:.*max_queue_delay_microseconds: (\d+))?", text, flags=re.MULTILINE)
    return int(found[1] or 0) if found else None


def current(repository: Path, every: Sequence[Knob], policy: Path) -> dict[str, Value]:
    """What is set; a setting whose models are not installed is left out."""
    routing, values = load_policy(policy).routing, dict[str, Value]()
    for knob in every:
        if knob.current is None:
            values[knob.name] = getattr(routing, knob.name.split(".")[1])
            continue
        configs = [repository / model / "config.pbtxt" for model in knob.models]
        installed = [config for config in configs if config.is_file()]
        if installed:
            values[knob.name] = knob.current(installed[0].read_text(encoding="utf-8"))
    return values


def write_variant(
    folder: Path,
    repository: Path,
    policy: Path,
    models: Sequence[str],
    every: Sequence[Knob],
    settings: Settings,
    changed: Sequence[str],
) -> None:
    """Write ``policy.yaml`` and ``repository/`` with settings.

    Args:
        folder: Where to; it is emptied.
        repository: Whose artifacts are linked.
        policy: The policy that the variant's extends or repeats.
        models: The repository's models that the variant has.
        every: All settings.
        settings: Their values.
        changed: Names of those that are not as they are in ``repository`` and ``policy``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for model in models:
        target = folder / "repository" / model
        target.mkdir(parents=True)
        for path in (repository / model).iterdir():
            if path.name == "config.pbtxt":
                text = path.read_text(encoding="utf-8")
                for knob in every:
                    if knob.change is not None and knob.name in changed and model in knob.models:
                        text = knob.change(text, settings[knob.name])
                (target / path.name).write_text(text, encoding="utf-8")
            elif path.name not in ("staging", "__pycache__"):
                (target / path.name).symlink_to(path.resolve())
    profile = policy.stem
    if profile in PROFILES and policy == profile_path(profile):
        values: dict[str, Any] = {"extends": profile}
    else:
        values = yaml.safe_load(policy.read_text(encoding="utf-8"))
    routing = {
        knob.name.split(".")[1]: list(value) if isinstance(value := settings[knob.name], tuple) else value
        for knob in every
        if knob.change is None and knob.name in changed
    }
    if routing:
        values["routing"] = {**values.get("routing", {}), **routing}
    (folder / "policy.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    load_policy(folder / "policy.yaml")


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        repository: The installed model repository.
        policy: The policy to start from.
        strategy: What the requests ask for.
        limit_ms: Most p99.
        callers: Numbers of callers that a server is tried with.
        rounds: Times that two variants are compared.
        seconds: Of load for each number of callers in a round.
        traffic: What traffic.
    """

    repository: Path
    policy: Path
    strategy: str = AUTO
    limit_ms: float = 50.0
    callers: tuple[int, ...] = (4, 8, 16, 32)
    rounds: int = 4
    seconds: float = 2.0
    traffic: WorkloadConfig = field(default_factory=WorkloadConfig)


class Tuner:
    """Tries settings one after the other.

    Args:
        search: How.
        every: The settings.
        names: Those to try, by parts of their names; all if there are none.
        folder: For variants that are tried.

    Raises:
        ConfigurationError: If no setting has such a name.
    """

    def __init__(self, search: Search, every: Sequence[Knob], names: Sequence[str], folder: Path) -> None:
        self._search = search
        self._folder = folder
        self._start = current(search.repository, every, search.policy)
        self._every = [knob for knob in every if knob.name in self._start]
        self._tries = [knob for knob in self._every if not names or any(name in knob.name for name in names)]
        if not self._tries:
            raise ConfigurationError(
                f"no setting is called {', '.join(names)}; there are {', '.join(knob.name for knob in self._every)}."
            )
        strategies = STRATEGIES if search.strategy == AUTO else (search.strategy,)
        wanted = [*DOOR_MODELS, *(model for name in strategies for model in STRATEGIES[name].models)]
        self._models = [model for model in dict.fromkeys(wanted) if (search.repository / model).is_dir()]
        bundle = load_bundle(search.repository)
        self._visits = stored_traffic(bundle, search.traffic).take(4_000)
        self._built = [message(step, 20.0) for step in door_steps(self._visits, search.strategy)]
        self._variants = 0

    def run(self) -> tuple[dict[str, Value], list[Trial]]:
        """The best settings found, and everything that was tried."""
        best, trials = dict(self._start), list[Trial]()
        for knob in self._tries:
            if knob.models and not set(knob.models) & set(self._models):
                continue
            for value in knob.values:
                if value == best[knob.name]:
                    continue
                other = with_value(best, knob.name, value)
                trials.append(trial := self._tried(best, other, knob.name))
                print(f"   {trial}", flush=True)
                if trial.taken:
                    best = other
        return best, trials

    def changed(self, settings: Settings) -> list[str]:
        """Names of the settings that are not as they are installed."""
        return [name for name, value in settings.items() if value != self._start[name]]

    def write(self, settings: Settings, folder: Path) -> None:
        """Write the variant."""
        search = self._search
        models = [path.parent.name for path in sorted(search.repository.glob("*/config.pbtxt"))]
        write_variant(folder, search.repository, search.policy, models, self._every, settings, self.changed(settings))

    def _tried(self, best: Settings, other: Settings, knob: str) -> Trial:
        before, value = best[knob], other[knob]
        try:
            with ExitStack() as stack:
                servers = [stack.enter_context(self._server(settings)) for settings in (best, other)]
                rounds = self._compared(servers)
        except MTGRError as error:
            return Trial(knob, before, value, (), (0.0, 0.0), False, str(error).splitlines()[0][:200])
        ratios = tuple(round(new / old, 4) if old else float(new > 0) + 1 for old, new in rounds)
        borne = (statistics.median(old for old, _ in rounds), statistics.median(new for _, new in rounds))
        return Trial(knob, before, value, ratios, borne, wins(ratios))

    def _server(self, settings: Settings) -> TritonServer:
        self._variants += 1
        folder, search = self._folder / str(self._variants), self._search
        write_variant(
            folder, search.repository, search.policy, self._models, self._every, settings, self.changed(settings)
        )
        return TritonServer(folder / "repository", environment={"MTGR_POLICY": str(folder / "policy.yaml")})

    def _compared(self, servers: Sequence[TritonServer]) -> list[tuple[float, float]]:
        """What the two bear, round by round; the one that goes first changes."""
        for server in servers:
            asyncio.run(self._borne(server, warm=True))
        rounds = []
        for index in range(self._search.rounds):
            found = {}
            for which in (0, 1) if index % 2 else (1, 0):
                found[which] = asyncio.run(self._borne(servers[which]))
            rounds.append((found[0], found[1]))
        return rounds

    async def _borne(self, server: TritonServer, warm: bool = False) -> float:
        """Most answers a second within the limit; 0 if no number of callers keeps it."""
        search, borne = self._search, 0.0
        async with RawCaller(server.grpc_url, self._built, 20.0) as caller:
            if warm:
                await closed_loop(caller, max(search.callers), 60.0, len(self._built) // 4)
            for callers in search.callers:
                samples = await closed_loop(caller, callers, search.seconds)
                answered = samples.latencies_of(Outcome.ANSWERED)
                good = len(answered) and len(answered) >= 0.99 * len(samples.outcomes)
                if good and 1e3 * percentile(answered, 99) <= search.limit_ms:
                    borne = max(borne, samples.goodput())
        return borne


def with_value(settings: Settings, knob: str, value: Value) -> dict[str, Value]:
    """The settings with another value; several engine processes are given one call more at a time."""
    changed = {**settings, knob: value}
    if knob == ENGINE_INSTANCES:
        running = changed[MAX_RUNNING]
        assert isinstance(running, int)
        assert isinstance(value, int)
        changed[MAX_RUNNING] = max(running, value + 1)
    return changed


def wins(ratios: Sequence[float]) -> bool:
    """Whether it was better in every round, and by ``MIN_GAIN`` at the middle one."""
    return bool(ratios) and min(ratios) > 1 and statistics.median(ratios) >= 1 + MIN_GAIN


def main(arguments: list[str] | None = None) -> int:
    """Tune; 0 when done, 2 with one sentence if it cannot be."""
    options = _parser().parse_args(arguments)
    try:
        search = _search(options)
        with tempfile.TemporaryDirectory() as folder:
            tuner = Tuner(search, knobs(len(os.sched_getaffinity(0))), options.knob, Path(folder))
            best, trials = tuner.run()
            tuner.write(best, options.out)
    except MTGRError as error:
        print(error, file=sys.stderr)
        return 2
    report(options.out, search, tuner.changed(best), best, trials)
    return 0


def report(out: Path, search: Search, changed: Sequence[str], best: Settings, trials: Sequence[Trial]) -> None:
    """Print what was found, and write it beside the variant."""
    taken = [trial for trial in trials if trial.taken]
    gain = 1.0
    for trial in taken:
        gain *= 1 + trial.gain
    result: dict[str, Any] = describe(search.traffic.seed) | {
        "strategy": search.strategy,
        "limit_ms": search.limit_ms,
        "callers": search.callers,
        "settings": dict(best),
        "changed": list(changed),
        "gain": round(gain - 1, 4),
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }
    write_json(out / "tuned.json", result)
    if not changed:
        print(f"nothing gains {MIN_GAIN:.0%} under {search.limit_ms:g} ms: the settings stay as they are.")
        return
    print(f"\n{search.strategy} under {search.limit_ms:g} ms at p99, {gain - 1:+.1%}:")
    for name in changed:
        print(f"   {name}: {_shown(best[name])}")
    print(
        f"\nTo serve it: MTGR_POLICY={out / 'policy.yaml'} python -m mtgr.serving --model-repository "
        f"{out / 'repository'}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model-repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--policy", type=Path, default=profile_path("prod"), help="to start from")
    parser.add_argument("--strategy", choices=(*STRATEGIES, AUTO), default=AUTO)
    parser.add_argument("--limit-ms", type=float, default=50.0, help="most p99")
    parser.add_argument("--callers", default="4,8,16,32", metavar="4,8,16,32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of load for each number of callers in a round")
    parser.add_argument("--knob", action="append", default=[], help="part of a setting's name; may be repeated")
    parser.add_argument("--history", type=float, default=WorkloadConfig.history_median)
    parser.add_argument("--candidates", type=float, default=WorkloadConfig.candidates_median)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "tuned")
    return parser


def _search(options: argparse.Namespace) -> Search:
    out, repository = options.out.resolve(), options.model_repository.resolve()
    for kept in (repository, ROOT / "model_repository", ROOT / "mtgr"):
        if out == kept or kept in out.parents or out in kept.parents:
            raise ConfigurationError(f"--out {options.out} would overwrite what is installed; name another folder.")
    if options.rounds < 1 or options.seconds <= 0 or options.limit_ms <= 0:
        raise ConfigurationError("--rounds, --seconds and --limit-ms must be positive.")
    traffic = WorkloadConfig(history_median=options.history, candidates_median=options.candidates, seed=options.seed)
    callers = tuple(int(part) for part in options.callers.split(","))
    return Search(
        repository,
        options.policy,
        options.strategy,
        options.limit_ms,
        callers,
        options.rounds,
        options.seconds,
        traffic,
    )


def _shown(value: Value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return "off" if value is None else str(value)


def _replaced(pattern: str, replacement: str, text: str, what: str) -> str:
    text, count = re.subn(pattern, replacement, text)
    if count != 1:
        raise ConfigurationError(f"a config.pbtxt has {count} settings of {what}; it must have one.")
    return text


def _found(pattern: str, text: str, what: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ConfigurationError(f"a config.pbtxt has no setting of {what}; export the model again.")
    return found[1]


if __name__ == "__main__":
    sys.exit(main())
