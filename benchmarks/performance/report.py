"""The results as text: one table for each question, ratios first."""

from __future__ import annotations

from collections.abc import Sequence

from performance.registry import BASE, OURS
from performance.results import FIGURES, Figure, Results, Summary

_BIG, _MIDDLE = 100, 10


def ratio(results: Results, figure: Figure, variant: str) -> float | None:
    """How many times as good as the workflow by hand: over 1 is better."""
    own, other = results.summary(figure.key, variant), results.summary(figure.key, BASE)
    if own is None or other is None or own.median <= 0 or other.median <= 0:
        return None
    return own.median / other.median if figure.more_is_better else other.median / own.median


def number(value: float) -> str:
    """A measured value, with as many digits as it deserves."""
    if abs(value) >= _BIG:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= _MIDDLE else f"{value:.2f}"


def cell(summary: Summary | None) -> str:
    """Median, and the spread of the rounds."""
    if summary is None:
        return "-"
    if summary.rounds == 1:
        return number(summary.median)
    return f"{number(summary.median)} ({number(summary.low)} to {number(summary.high)})"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def rows(results: Results, figures: Sequence[Figure]) -> list[list[str]]:
    """A row for each variant: its ratio, then its figures."""
    table = [["", *(f"{figure.title}, {figure.unit}" for figure in figures)]]
    for name, variant in results.variants.items():
        cells = []
        for figure in figures:
            summary = results.summary(figure.key, name)
            held = times(ratio(results, figure, name))
            cells.append(cell(summary) if held == "-" else f"{held}: {cell(summary)}")
        if any(text != "-" for text in cells):
            table.append([variant["title"], *cells])
    return table


def text_table(results: Results) -> str:
    """All that was measured, for a terminal; ratios are to the workflow by hand, over 1 is better."""
    lines: list[str] = []
    names = list(results.variants)
    for figure in FIGURES.values():
        if figure.key not in results.samples:
            continue
        lines.append(f"\n{figure.title} [{figure.unit}]")
        for name in names:
            if (summary := results.summary(figure.key, name)) is not None:
                held = times(ratio(results, figure, name)) if figure.unit != "x" else "-"
                lines.append(f"  {held:>9}  {results.variants[name]['title']:32} {cell(summary)}")
    lines.append("\nhow long it took [s]")
    lines += [f"  {question:12} {seconds:6.0f}" for question, seconds in results.seconds.items()]
    lines += [f"\nleft out: {name}: {reason}" for name, reason in results.left_out.items()]
    return "\n".join(lines)


TARGETS = (
    ("1-step throughput, workflow execution", "throughput-1", "workflow", 1.0),
    ("5-step throughput, workflow execution", "throughput-5", "workflow", 1.7),
    ("1-step throughput, standalone", "throughput-1", "standalone", 1.6),
    ("5-step throughput, standalone", "throughput-5", "standalone", 2.5),
)
"""What was aimed at: at least so many times the workflow by hand."""
LIMITS = (
    *((f"submit against the SDK's own start call, {name}", "submit-ratio", name, 1.05, "x") for name in OURS),
    ("worker CPU of the library a step, in memory", "engine-step", "workflow", 150.0, "us"),
    *(
        (f"worker memory for a task {words}, {name}", f"memory-{what}", name, 0.0, "KB")
        for what, words in (("backoff", "in backoff"), ("sleep", "that sleeps"), ("poll", "between two polls"))
        for name in OURS
    ),
    ("the same of a task that sleeps, beyond the SDK's cache, workflow", "memory-beyond", "workflow", 0.0, "KB"),
)
"""And what was to be no more than this."""


def targets(results: Results) -> list[list[str]]:
    """What was aimed at, what came of it, and what comes of the same writes without this library."""
    table = [["", "aimed at", "measured", "the floor"]]
    for title, key, variant, wanted in TARGETS:
        if (found := ratio(results, FIGURES[key], variant)) is not None:
            floor = ratio(results, FIGURES[key], f"floor-{variant}")
            table.append([title, f"at least {wanted:.1f} x", times(found), times(floor)])
    for title, key, variant, limit, unit in LIMITS:
        if (summary := results.summary(key, variant)) is not None:
            measured = f"{cell(summary)} {unit}"
            # Of a task that has ended nothing is left: what it seems to take is what this can tell.
            if key.startswith("memory") and (ended := results.summary("memory-ended", variant)) is not None:
                measured += f"; of a task that has ended {cell(ended)} {unit}"
            table.append([title, f"at most {limit:g} {unit}", measured, ""])
    return table
