"""Plots of the benchmarks; they need matplotlib (the extra `bench`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_COLORS = {"layer": "#9a9a9a", "row": "#d08a2c", "graph": "#24609b"}


def _pyplot() -> ModuleType | None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return None
    pyplot.switch_backend("Agg")
    return pyplot


def scaling(
    rows: Sequence[Mapping[str, Any]], modes: Sequence[str], title: str, path: Path
) -> None:
    """Rates over device counts, a line for each split mode, the plan's dashed.

    Args:
      rows: sorted by `devices`, with `mode` and, for `decode` and `prefill`, tokens/s and those of
        the plan (`decode_plan`); "" or None where not measured.
      modes: split modes to draw.
      title: heading.
      path: PNG file.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for panel, kind in zip(panels, ("decode", "prefill"), strict=True):
        for mode in modes:
            points = [r for r in rows if r["mode"] in ("none", mode) and r[kind] not in ("", None)]
            planned = [r for r in points if r[f"{kind}_plan"] not in ("", None)]
            color = _COLORS.get(mode)
            panel.plot(*_line(points, kind), "o-", color=color, label=mode)
            panel.plot(*_line(planned, f"{kind}_plan"), "--", color=color, lw=1)
        panel.set(xlabel="devices", ylabel=f"{kind}, tokens/s", ylim=(0, None))
        panel.set_xticks(sorted({r["devices"] for r in rows}))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, title="dashed: plan")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _line(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [row["devices"] for row in rows], [row[key] for row in rows]


def meshes(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], title: str, path: Path
) -> None:
    """Bars for each mesh shape, the plan's prediction below each.

    Args:
      rows: with `split`, and for each key of `labels` a number and that of the plan (`KEY_plan`).
      labels: the panels: key → label of its axis.
      title: heading.
      path: PNG file.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return
    size = (2 + 3.7 * len(labels), 0.5 * len(rows) + 1.8)
    figure, panels = pyplot.subplots(1, len(labels), figsize=size, sharey=True)
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        for end, shift, color in (("", 0.19, "#24609b"), ("_plan", -0.19, "#c4d6e8")):
            heights = [len(rows) - 1 - i + shift for i in range(len(rows))]
            values = [row[key + end] or 0 for row in rows]
            panel.barh(heights, values, 0.36, label=end[1:] or "measured", color=color)
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks([len(rows) - 1 - i for i in range(len(rows))], [r["split"] for r in rows])
    figure.suptitle(title, fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="upper right", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
