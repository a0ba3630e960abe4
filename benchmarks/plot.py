"""The document as a picture: a column of bars for each case, and below, what grows with the size."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contestant import LARS
from benchmarks.contestants import CPU

__all__ = ["draw"]

# Okabe and Ito's colours, which readers with any colour vision can tell apart.
OURS, PEER, OTHER = "#0072B2", "#E69F00", "#999999"
MARKS = "os^Dvp"
LONGEST = 3  # ratio; a few contestants take ten times as long, and the others would be slivers beside them


def draw(document: dict[str, Any]) -> bytes:
    """Return a PNG.

    Parameters
    ----------
    document : dict
        As `benchmarks.results` has it.
    """
    cases = {
        name: case
        for name, case in document["cases"].items()
        if any(row["ratio"] is not None for row in case["contestants"].values())
    }
    growth = document.get("growth")
    heights = [1.2 + 0.3 * _count(cases)] * bool(cases) + [3.4] * bool(growth)
    if not heights:
        heights = [1.0]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if cases:
        _bars(parts.pop(0), cases)
    if growth:
        _lines(parts.pop(0), growth)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def _count(cases: dict[str, Any]) -> int:
    return len({name for case in cases.values() for name in case["contestants"]})


def _bars(figure: Any, cases: dict[str, Any]) -> None:
    """Ratios to flash's arithmetic, all contestants in all columns in the order of the first."""
    labels: dict[str, str] = {}
    for case in cases.values():
        for name, row in sorted(case["contestants"].items(), key=lambda item: item[1]["median_ms"]):
            labels.setdefault(name, row["label"])
    columns = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, (name, case) in zip(columns, cases.items()):
        rows = case["contestants"]
        axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
        for place, who in enumerate(labels):
            _bar(axes, place, who, rows[who]["ratio"] if who in rows else None)
        axes.set_xlim(0, LONGEST * 1.25)
        axes.set_xticks(range(LONGEST + 1))
        size = f"{case['elements'] / 1e6:,.0f} M in {case['arrays']:,}"
        axes.set_title(f"{name}\n{size}", loc="left", fontsize=10)
        axes.set_yticks(range(len(labels)), labels.values(), fontsize=8)
        _plain(axes)
    columns[0].invert_yaxis()
    figure.suptitle(
        "Time per step relative to flash's arithmetic in torch (lower is faster): median and quartiles over rounds.\n"
        "Blue: lars_array. Orange: other LARS. Grey: not LARS.",
        fontsize=11,
        x=0.01,
        ha="left",
    )


def _bar(axes: Axes, place: int, name: str, ratio: dict[str, Any] | None) -> None:
    """One bar with its quartiles and its number; a longer one than the axis is cut, and its number says so."""
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    style: dict[str, Any] = {"va": "center", "fontsize": 8, "bbox": behind}
    if ratio is None:
        axes.text(0.05, place, "skipped", color="#777777", **style)
        return
    median, (low, high) = ratio["median"], ratio["quartiles"]
    axes.barh(place, min(median, LONGEST), color=_colour(name))
    if median > LONGEST:
        axes.text(LONGEST + 0.05, place, f"… {median:.3g}", **style)
        return
    axes.plot([low, min(high, LONGEST)], [place, place], color="#333333", linewidth=1)
    axes.text(min(high, LONGEST) + 0.05, place, f"{median:.2f}", **style)


def _lines(figure: Any, growth: dict[str, Any]) -> None:
    """Nanoseconds an element, and memory, against the size of one array."""
    left, right = figure.subplots(1, 2)
    for (name, row), mark in zip(growth["contestants"].items(), MARKS):
        here = [(size, x) for size, x in zip(growth["sizes"], row["sizes"]) if x is not None]
        style = {"marker": mark, "color": _colour(name), "label": row["label"], "alpha": 0.8}
        left.plot([size for size, _ in here], [1e6 * x["median_ms"] / size for size, x in here], **style)
        memory = [(size, x.get("memory", {}).get("resident")) for size, x in here]
        known = [(size, bytes_ / 1e6) for size, bytes_ in memory if bytes_ is not None]
        right.plot([size for size, _ in known], [megabytes for _, megabytes in known], **style)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("elements of the array")
        axes.set_ylim(bottom=0)
        _plain(axes)
    left.set_title("Nanoseconds per element", loc="left", fontsize=10)
    right.set_title("MB beside parameters, gradients and momentum", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)


def _colour(name: str) -> str:
    contestant = next((c for c in CPU if c.name == name), None)
    if contestant is None or contestant.kind != LARS:
        return OTHER
    return OURS if name.startswith("lars_array") else PEER


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
