"""The command behind scripts/bench."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import signal
import sys
import tempfile
from pathlib import Path

from performance.conduct import Benchmark
from performance.registry import VARIANTS
from performance.report import targets, text_table
from performance.results import QUESTIONS, Results
from performance.sizes import QUICK, TINY, Sizes

_RESULTS = Path("benchmarks/results.json")


async def _run(benchmark: Benchmark) -> Results:
    """Run it; a SIGTERM stops it as a Ctrl-C does, with all that it has started."""
    running = asyncio.current_task()
    if running is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    return await benchmark.run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure this library against the field.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small numbers, two rounds: for a look")
    size.add_argument("--tiny", action="store_true", help="as small as it gets: to see that it works")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=[*QUESTIONS, *VARIANTS],
        help=f"parts: questions ({', '.join(QUESTIONS)}) and variants ({', '.join(VARIANTS)})",
    )
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--json", type=Path, help=f"where the results go; default, for a full run: {_RESULTS}")
    options = parser.parse_args()
    sizes = TINY if options.tiny else QUICK if options.quick else Sizes()
    if options.rounds:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    only = options.only or []
    variants = [name for name in VARIANTS if name in only] or list(VARIANTS)
    questions = [name for name in QUESTIONS if name in only] or list(QUESTIONS)
    path = options.json
    if path is None and not (only or options.quick or options.tiny):
        path = _RESULTS
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        results = asyncio.run(_run(Benchmark(sizes, Path(folder), variants, questions)))
    if path is not None:
        path.write_text(results.to_json())
    print(text_table(results))
    print()
    for row in targets(results):
        print(f"{row[0]:60} {row[1]:18} {row[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
