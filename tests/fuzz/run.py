"""Broken inputs: headers of models, head scores, policy specs, task files and results files.

    python -m tests.fuzz.run                          # 10,000 of each
    python -m tests.fuzz.run heads specs --n 300 --seed mine

Inputs are valid ones whose structure or bytes were damaged. Each is used as the package uses such a file, in a process
with bounds of time and memory. Every tenth header is also loaded as a model, by ours and by stock llama.cpp. An input is
a finding if it ends in another error than the documented one, takes too long or too much memory, or kills a process
that stock survives. Findings are kept as files; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz.runner import STOCK, run  # noqa: E402
from fuzz.targets import TARGETS  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--n", type=int, default=10_000, help="inputs of each")
    parser.add_argument("--seed", default="0", help="of the random numbers")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "windowkv-fuzz",
        help="folder for inputs that are findings",
    )
    parser.add_argument(
        "--no-loads", action="store_true", help="load no headers; for an install without -DWINDOWKV_TESTS=ON"
    )
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(TARGETS)}")
    if not args.no_loads and not STOCK.exists():
        parser.error(f"there is no stock library in {STOCK}; install with -DWINDOWKV_TESTS=ON, or give --no-loads")
    found = 0
    for name in args.targets or TARGETS:
        start = time.monotonic()
        report = run(name, args.n, args.seed, args.out, loads=name == "headers" and not args.no_loads)
        ends = ", ".join(f"{count:,} {what}" for what, count in sorted(report.outcomes.items()))
        print(f"{name}: {args.n:,} inputs in {time.monotonic() - start:.0f} s: {ends}", flush=True)
        for path, what in report.findings:
            print(f"  {path}: {what}", flush=True)
        found += len(report.findings)
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
