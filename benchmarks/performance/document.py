"""Writes the tables and plots of docs/performance.md from the results: ``scripts/bench --docs [RESULTS]``.

Nothing in them is written by hand. In the page, a table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

from performance.registry import OURS
from performance.report import number, rows, targets
from performance.results import FIGURES, Results
from performance.sizes import Sizes

PAGE = Path("docs/performance.md")
IMAGES = Path("docs/images/performance")
RESULTS = Path("benchmarks/results.json")
_BLOCK = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OURS_COLOUR, _OTHERS_COLOUR = "#2b6cb0", "#a0aec0"

TABLES: dict[str, Sequence[str]] = {
    "throughput": ("throughput-1", "throughput-1-step", "throughput-5"),
    "latency": ("idle-p50", "idle-p99", "idle-5-p50", "loaded-p50", "loaded-p99"),
    "submit": ("submit-p50", "submit-ratio"),
    "status": ("status-running", "status-finished"),
    "steps": ("steps-in-a-row", "task-500", "task-5000", "growth"),
    "fan": ("fan-500",),
    "cost": (
        "worker-cpu-task",
        "server-cpu-task",
        "client-cpu-task",
        "worker-cpu-step",
        "server-cpu-step",
        "worker-cpu-idle",
    ),
    "memory": (
        "memory-in-flight",
        "memory-sleep",
        "memory-backoff",
        "memory-poll",
        "memory-beyond",
        "memory-ended",
        "memory-worker",
    ),
    "drain": ("drain-1", "drain-2", "drain-4"),
    "resume": ("resume",),
    "engine": (
        "engine-task",
        "engine-step",
        "engine-sync-step",
        "engine-task-uvloop",
        "engine-step-uvloop",
        "rules-step",
    ),
}
"""The figures of each table, and of the plot of the same name."""


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head."""
    head, *body = table
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


def _of_figures(name: str) -> Callable[[Results], str]:
    return lambda results: markdown(rows(results, [FIGURES[key] for key in TABLES[name]]))


def _machine(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    facts = results.machine
    sizes = ", ".join(f"{name} {value}" for name, value in results.sizes.items())
    left_out = [[name, " ".join(reason.split())[:200]] for name, reason in results.left_out.items()]
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}, Python {facts['python']}; {facts['measured']}, "
        f"load before {facts['load_before']}.\n{versions}.\nServers: {'; '.join(results.servers)}.\nSizes: {sizes}.\n"
        + ("\n" + markdown([["left out", "why"], *left_out]) if left_out else "")
    )


def _note(results: Results) -> str:
    """What the reader must know before the figures."""
    full = asdict(Sizes())
    smaller = {name: value for name, value in results.sizes.items() if value != json.loads(json.dumps(full[name]))}
    notes = []
    if smaller:
        sizes = ", ".join(f"{name} {value} instead of {full[name]}" for name, value in smaller.items())
        notes.append(
            f"**This is a run at reduced sizes, good for a look only**: {sizes}. A title below that names a size names "
            f"the full one."
        )
    if results.machine["load_before"] > results.machine["cores"] / 2:
        notes.append(
            f"**The machine was busy with other work** (load {results.machine['load_before']} before it began, on "
            f"{results.machine['cores']} cores): the figures are worse than they would be, and noisy."
        )
    return "\n\n".join(notes) + "\n" if notes else "A full run, before which the machine did nothing else.\n"


def _durability(results: Results) -> str:
    return markdown([["", "what is durable"], *([v["title"], v["durability"]] for v in results.variants.values())])


def _limits(results: Results) -> str:
    """How many processors a variant keeps busy at its throughput, and who of them."""
    table = [["50 tasks of one call at once", "worker", "server", "client", "of all cores"]]
    cores = results.machine["cores"]
    for name, variant in results.variants.items():
        rate = results.summary("throughput-1", name)
        if rate is None:
            continue
        used = []
        for who in ("worker", "server", "client"):
            cost = results.summary(f"{who}-cpu-task", name)
            used.append(cost.median * rate.median / 1e3 if cost else 0.0)
        table.append([variant["title"], *(f"{share:.2f}" for share in used), f"{sum(used) / cores:.0%}"])
    return markdown(table)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "note": _note,
    "machine": _machine,
    "durability": _durability,
    "targets": lambda results: markdown(targets(results)),
    "limits": _limits,
    **{name: _of_figures(name) for name in TABLES},
}


def write_page(results: Results, page: Path) -> None:
    """Put the tables into the page."""

    def block(found: re.Match[str]) -> str:
        return found[1] + "\n" + BLOCKS[found["name"]](results) + "\n" + found[3]

    page.write_text(_BLOCK.sub(block, page.read_text()))


def plot(results: Results, name: str, path: Path) -> bool:
    """One panel for each figure: a bar for each variant, its spread as a line. False if nothing was measured."""
    figures = [FIGURES[key] for key in TABLES[name] if key in results.samples]
    if not figures:
        return False
    shown = [v for v in results.variants if any(results.summary(figure.key, v) for figure in figures)]
    height = 0.9 + 0.32 * len(shown)
    drawing, panels = plt.subplots(len(figures), 1, figsize=(8, height * len(figures)), squeeze=False)
    for panel, figure in zip(panels[:, 0], figures, strict=True):
        found = [(v, summary) for v in shown if (summary := results.summary(figure.key, v)) is not None]
        titles = [results.variants[v]["title"] for v, _ in found]
        medians = [summary.median for _, summary in found]
        spread = [
            [max(summary.median - summary.low, 0) for _, summary in found],
            [max(summary.high - summary.median, 0) for _, summary in found],
        ]
        colours = [_OURS_COLOUR if v in OURS else _OTHERS_COLOUR for v, _ in found]
        panel.barh(titles, medians, xerr=spread, color=colours, ecolor="#4a5568", capsize=2)
        for at, (median, (_, summary)) in enumerate(zip(medians, found, strict=True)):
            panel.text(max(summary.high, 0), at, f"  {number(median)}", va="center", fontsize=8)
        better = "more is better" if figure.more_is_better else "less is better"
        panel.set_title(f"{figure.title} [{figure.unit}], {better}", fontsize=9, loc="left")
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=90)
    plt.close(drawing)
    return True


def main() -> int:
    results = Results.load(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
    mpl.use("Agg")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        if plot(results, name, IMAGES / f"{name}.png"):
            print(IMAGES / f"{name}.png")
    write_page(results, PAGE)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
