"""What a session does when memory runs out: one allocation of libllama or ggml fails, each in a forked process of its own.

    python tests/session/allocation_runs.py         # every allocation, of three models, in C and in Python: see --help

The phases are a load, a prompt, a compaction and 64 tokens, some at a time. A child goes on from the state before its phase with
one allocation of that phase failing, then once more without, and finishes; logits, cells and bytes have to be those of a run in
which nothing failed, and what is left behind, too.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from allocation_steps import N_TOKENS, PHASES, Limited, Native, Session, Steps  # noqa: E402
from failing_alloc import OWN, Allocator, Frames  # noqa: E402

SECONDS = 60  # a child that takes longer hangs


#
# one child
#


@dataclass
class End:
    """How a child ended."""

    kind: str  # "survived", "refused", "crashed", "hung"
    said: str = ""
    wrong: list[str] = field(default_factory=list)
    stack: Frames = ()  # of the allocation that failed
    crash: Frames = ()


@dataclass
class Clean:
    """A run in which nothing failed."""

    allocations: list[tuple[int, Frames]]
    marks: dict[str, Any]
    left: Counter[tuple[int, Frames]]


def _finish(steps: Steps, phase: str, phases: Sequence[str], n_tokens: int) -> dict[str, Any]:
    """What is held behind each phase from this one on, which was done, and behind n_tokens more tokens; closes."""
    marks = {phase: steps.held()}
    for one in phases[phases.index(phase) + 1 : -1]:
        getattr(steps, one)()
        marks[one] = steps.held()
    steps.n_wanted += n_tokens
    steps.tokens()
    marks["end"] = steps.held()
    steps.close()
    return marks


def clean(allocator: Allocator, steps: Steps, phases: Sequence[str], n_tokens: int, phase: str) -> Clean:
    allocator.arm(0)
    getattr(steps, phase)()
    count = allocator.disarm()
    marks = _finish(steps, phase, phases, n_tokens)
    return Clean(allocator.stacks(range(count)), marks, Counter(allocator.stacks(allocator.live())))


N_FRAMES, N_SAME = 6, 3
"""Frames that a child looks at, the allocator's own included, and those of llama.cpp from the innermost one on that tell allocations
apart. Whole stacks take most of its time, and are of interest only where something is left behind."""


def _left(allocator: Allocator, want: Clean, n: int | None) -> Counter[tuple[int, Frames]]:
    """What is allocated and was not in the run in which nothing failed, told apart by n frames."""
    there, before = Counter[tuple[int, Frames]](), Counter[tuple[int, Frames]]()
    for n_bytes, frames in allocator.stacks(allocator.live()):
        there[n_bytes, frames[:n]] += 1
    for (n_bytes, frames), number in want.left.items():
        before[n_bytes, frames[:n]] += number
    return there - before


def failing(
    allocator: Allocator, steps: Steps, phases: Sequence[str], n_tokens: int, phase: str, want: Clean, whole: bool, n: int
) -> End | None:
    """How it ended; None if whole stacks have to tell what is left behind."""
    stack = want.allocations[n - 1][1]
    allocator.depth(0 if whole else N_FRAMES)
    before = None if phase == "load" else steps.held()
    end = End("survived", stack=stack)
    allocator.arm(n)
    try:
        getattr(steps, phase)()
    except Exception as error:  # of whatever kind: steps.check() looks at it
        end.kind, end.said = "refused", f"{type(error).__name__}: {error}"
    allocator.disarm()
    try:
        if end.said:
            end.wrong += steps.check(phase, end.said, before, allocator.is_own(stack))
            _again(steps, phases, phase)
        marks = _finish(steps, phase, phases, n_tokens)
    except Exception as error:
        end.wrong.append(f"cannot be used afterwards: {type(error).__name__}: {error}")
        return end
    for one, mark in marks.items():
        for name, got, expected in zip(steps.HELD, mark, want.marks[one], strict=True):
            if got != expected:
                end.wrong.append(
                    f"{name} behind the {one}" + (f": {got}, expected {expected}" if name != "logits" else "")
                )
    if not whole:
        return None if _left(allocator, want, N_SAME) else end
    # what an upstream function loses that fails inside is upstream's: both were allocated below one call of ours, or of nobody of ours
    caller = allocator.caller(stack)
    for n_bytes, frames in _left(allocator, want, None).elements():
        if OWN.search(allocator.where(frames, 1)) or allocator.caller(frames) != caller:
            end.wrong.append(f"left behind: {n_bytes} bytes of {allocator.where(frames)}")
    return end


def _again(steps: Steps, phases: Sequence[str], phase: str) -> None:
    """The phase that failed; before it what was lost with it."""
    if phase == "prompt":
        steps.clear()
    lost = phase in ("compaction", "tokens") and steps.held()[0] == 0
    for one in phases[1 : phases.index(phase)] if lost else ():
        getattr(steps, one)()
    getattr(steps, phase)()


#
# all children
#


class Children:
    """Forked processes, some at a time; each returns what its function does."""

    def __init__(self, allocator: Allocator, n_jobs: int) -> None:
        self._allocator, self._n_jobs = allocator, n_jobs
        gc.freeze()  # a collection in a child would copy every page

    def map(self, fn: Callable[[Any], Any], values: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Pairs of a value and what became of it, as they come: what the function returned, or the status of a child that crashed
        with the stack where it did."""
        todo, free = iter(values), list(range(self._n_jobs))
        running: dict[int, tuple[int, int, Any, bytearray]] = {}
        while True:
            for value in itertools.islice(todo, len(free)):
                place = free.pop()
                read, write = os.pipe()
                pid = os.fork()
                if pid == 0:
                    self._child(fn, value, place, write)
                os.close(write)
                running[read] = pid, place, value, bytearray()
            if not running:
                return
            for read in select.select(list(running), [], [])[0]:
                pid, place, value, data = running[read]
                part = os.read(read, 1 << 20)
                data += part
                if part:
                    continue
                del running[read]
                os.close(read)
                free.append(place)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                yield value, pickle.loads(data) if status == 0 else (status, self._allocator.crash(place)[1])

    def _child(self, fn: Callable[[Any], Any], value: Any, place: int, write: int) -> None:
        status = 1
        try:
            signal.alarm(SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            self._allocator.catch_crashes(place)
            data = pickle.dumps(fn(value))
            with os.fdopen(write, "wb") as pipe:
                pipe.write(data)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)


class Sample(NamedTuple):
    """How many stacks of a phase are tried: of those with a function of ours, where None = all and each at its first and at its last
    allocation, and of the others."""

    ours: int | None
    others: int


def chosen(
    allocator: Allocator, stacks: Sequence[Frames], sample: Sample | None, functions: Sequence[str]
) -> list[int]:
    """Which allocations fail, from 1 on; without a sample all. With ``functions`` the first ones of some
    stacks whose innermost function is among them."""
    first: dict[Frames, int] = {}
    last: dict[Frames, int] = {}
    for i, frames in enumerate(stacks, 1):
        first.setdefault(frames, i)
        last[frames] = i
    if functions:
        inner = {i: allocator.where(frames, 1) for frames, i in first.items()}
        return sorted(i for one in functions for i in [i for i in inner if inner[i] == one][:4])
    if sample is None:
        return list(range(1, len(stacks) + 1))
    ours, others = [], []
    for frames, i in first.items():
        (ours if allocator.is_own(frames) else others).append(i)
    res = set(_evenly(others, sample.others))
    res |= set(_evenly(ours, sample.ours)) if sample.ours is not None else {*ours, *(last[stacks[i - 1]] for i in ours)}
    return sorted(res)


def _evenly(values: list[int], n: int) -> list[int]:
    return values[:: max(1, -(-len(values) // max(1, n)))]


def explore(
    allocator: Allocator,
    steps: Steps,
    phases: Sequence[str],
    sample: Sample | None,
    functions: Sequence[str],
    n_jobs: int,
) -> Iterator[tuple[str, int, End]]:
    """Phase, number and end of all allocations that :func:`chosen` names."""
    children = Children(allocator, n_jobs)
    # where every allocation is tried, children that start close before it and stop soon after take a third of the time
    n_tokens = 4 if sample is None and not functions else N_TOKENS
    for phase in [*phases[:-1], *[phases[-1]] * (N_TOKENS // n_tokens)]:
        steps.n_wanted += n_tokens if phase == "tokens" else 0
        common = (allocator, steps, phases, n_tokens if phase != "tokens" else 4, phase)
        ((_, want),) = children.map(lambda _, own=common: clean(*own), [phase])  # type: ignore[misc]
        assert isinstance(want, Clean), f"{phase}: {want}"
        numbers = chosen(allocator, [frames for _, frames in want.allocations], sample, functions)
        ends = dict(children.map(functools.partial(failing, *common, want, False), numbers))
        again = [n for n, end in ends.items() if end is None]
        ends |= dict(children.map(functools.partial(failing, *common, want, True), again))
        for n, end in ends.items():
            if not isinstance(end, End):
                status, crash = end
                kind = "hung" if status == -signal.SIGALRM else "crashed"
                end = End(kind, f"status {status}", stack=want.allocations[n - 1][1], crash=crash)
            yield phase, n, end
        getattr(steps, phase)()
    steps.close()


#
# the processes that fork
#

MODELS = {
    "llama": "windowkv+adakv(window_size=6, omega=4)",
    "gpt-oss": "windowkv(window_size=6, omega=4)",
    "lfm2": "snapkv(window_size=6)",
}
"""Architectures and the policies they are tried with: a plain model, one with sliding windows, a hybrid."""


STEPS = ("native", "session", "limited")

SAME = {"ggml_gallocr_alloc_graph": "ggml_backend_sched_reserve"}
"""Functions that call a static one of ggml in which they crash (ggml_gallocr_reserve_n_impl), ours and what stock calls."""


@dataclass
class Found:
    """What became of all allocations of one model.

    Attributes:
        counts: per phase, how often each kind of end was met; "ours" are allocations whose stack has a function of ours.
        faults: what must not be.
        upstream: crashes without a function of ours, by where they were.
        beneath: crashes of functions of upstream's that ours call, by the function. Stock has to crash in them, too.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    upstream: Counter[str] = field(default_factory=Counter)
    beneath: Counter[str] = field(default_factory=Counter)

    def add(self, allocator: Allocator, phase: str, end: End) -> None:
        own = allocator.is_own(end.stack) or allocator.is_own(end.crash)
        where = f"{phase}: {allocator.where(end.stack)}"
        self.counts.setdefault(phase, Counter()).update(["tried", end.kind, *(["ours"] if own else [])])
        if end.kind == "crashed" and not own:
            self.upstream[where] += 1
        elif end.kind == "crashed" and not OWN.search(allocator.where(end.stack, 1)):
            self.beneath[allocator.where(end.stack, 1)] += 1
        elif end.kind in ("crashed", "hung"):
            self.faults[f"{where} {end.kind} ({end.said}): {allocator.where(end.crash, 8)}"] += 1
        for wrong in end.wrong:
            self.faults[f"{where} {end.kind} ({end.said}): {wrong}"] += 1


def write_model(arch: str, folder: Path, **kwargs: Any) -> Path:
    """A tiny model of one of MODELS."""
    import tiny_model

    write = {"llama": tiny_model.write_llama, "gpt-oss": tiny_model.write_gpt_oss, "lfm2": tiny_model.write_lfm2}[arch]
    return write(folder / f"{arch}.gguf", **kwargs)


def _fork(path: str, arch: str, steps: str, sample: Sample | None, functions: Sequence[str], n_jobs: int) -> Found:
    """In a process with the allocator."""
    phases = PHASES
    own: Steps
    if steps == "stock":
        phases = tuple(phase for phase in PHASES if phase != "compaction")
        own = Native(path, None)
    else:
        from windowkv_edge.policies import get_policy

        policy = get_policy(MODELS[arch])
        own = {"native": Native, "session": Session, "limited": Limited}[steps](path, policy)
    allocator, res = Allocator(), Found()
    for phase, _, end in explore(allocator, own, phases, sample, functions, n_jobs):
        res.add(allocator, phase, end)
        if functions and end.kind == "crashed":
            res.beneath[allocator.where(end.stack, 1)] += 1
    return res


def _explored(
    tests: Path, model: Path, arch: str, steps: str, sample: Sample | None, functions: Sequence[str], n_jobs: int
) -> Found:
    env = {
        **os.environ,
        "LD_PRELOAD": str(tests / "failing-alloc.so"),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    env |= {"GGML_NO_BACKTRACE": "1"} | ({"LLAMA_CPP_LIB_PATH": str(tests / "stock")} if steps == "stock" else {})
    with tempfile.NamedTemporaryFile() as file:
        call = pickle.dumps((str(model), arch, steps, sample, functions, n_jobs))
        subprocess.run([sys.executable, __file__, "--fork", file.name, call.hex()], env=env, check=True)
        return Found(**pickle.loads(Path(file.name).read_bytes()))


def explored(tests: Path, model: Path, arch: str, steps: str, sample: Sample | None, n_jobs: int = 1) -> Found:
    """Everything about one model, in processes of their own.

    Args:
        tests: the folder of the native tests.
        model: the file.
        arch: one of MODELS.
        steps: "native", the C interface, "session", or "limited", one with ``kv_limit``.
        sample: None = every allocation.
        n_jobs: processes at a time.
    """
    res = _explored(tests, model, arch, steps, sample, (), n_jobs)
    if res.beneath:
        wanted = {function: SAME.get(function, function) for function in res.beneath}
        stock = _explored(tests, model, arch, "stock", sample, sorted(wanted.values()), n_jobs).beneath
        for function in (one for one in wanted if wanted[one] not in stock):
            res.faults[f"{function} crashes beneath ours, and stock does not there"] += res.beneath[function]
    return res


def main() -> None:
    if sys.argv[1:2] == ["--fork"]:
        found = _fork(*pickle.loads(bytes.fromhex(sys.argv[3])))
        Path(sys.argv[2]).write_bytes(pickle.dumps(vars(found)))
        return

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=MODELS, action="append", help="models, all by default")
    parser.add_argument("--steps", choices=STEPS, action="append", help="all by default")
    parser.add_argument(
        "--stacks", action="store_true", help="every stack with a function of ours, not every allocation"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    args = parser.parse_args()

    import windowkv_edge

    tests = Path(windowkv_edge.__file__).parent / "_tests"
    n_faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for arch, steps in itertools.product(args.arch or MODELS, args.steps or STEPS):
            found = explored(
                tests,
                write_model(arch, Path(folder)),
                arch,
                steps,
                Sample(None, 20) if args.stacks else None,
                args.jobs,
            )
            print(report(arch, steps, found), flush=True)
            n_faults += found.faults.total()
    sys.exit(n_faults > 0)


def report(arch: str, steps: str, found: Found) -> str:
    """Counts, crashes and faults."""
    lines = [f"{arch} {steps} {phase}: {dict(counts)}" for phase, counts in found.counts.items()]
    for name in ("upstream", "beneath", "faults"):
        lines += [f"  {name}: {n} x {where}" for where, n in getattr(found, name).most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
