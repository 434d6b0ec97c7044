"""Every picture of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

from benchmarks.candidates import CANDIDATES, DEFAULTS, IN_SWEEP, OF_TRL  # noqa: E402
from benchmarks.device import MACHINES  # noqa: E402
from benchmarks.mass_study import DROPS  # noqa: E402
from benchmarks.results import Row  # noqa: E402
from benchmarks.scaling import GPUS  # noqa: E402
from benchmarks.shapes import HEADS  # noqa: E402
from benchmarks.trainers import EVERYWHERE  # noqa: E402
from fused_prefopt.cli.pictures import legends_below
from fused_prefopt.ops.dropped_mass import PART  # noqa: E402

OURS, _PEER, _OTHER, FAINT = "#0b6e99", "#9aa5ad", "#d1782f", "#d7dce0"
LINES = {
    "ours: auto": (OURS, "-", "o"),
    "ours: recompute": ("#56b4d3", "--", "s"),
    "TRL": (_OTHER, "-", "^"),
    "eager": ("#6b6b6b", "-", "D"),
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def draw_all(results: Mapping[str, Any], folder: Path) -> None:
    """Draw time.png, error.png and sweep.png into the folder."""
    heads = {name: results[f"head-{name}"]["rows"] for name in ("fp32", "bf16")}
    with pyplot.rc_context(STYLE):
        draw_time(heads, folder / "time.png")
        draw_error(heads, folder / "error.png")
        draw_sweep(results["sweep"]["rows"], folder / "sweep.png")


def draw_time(heads: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Bars of time in P, a panel per dtype."""
    figure, panels = pyplot.subplots(1, len(heads), figsize=(9.5, 4.2), sharey=True)
    for panel, (dtype, rows) in zip(panels, heads.items(), strict=True):
        rows = _in_order(rows)
        names = [row["candidate"] for row in rows]
        values = [row["in_p"] or 0.0 for row in rows]
        colours = [OURS if CANDIDATES[row["candidate"]].ours else _PEER for row in rows]
        panel.barh(names, values, color=colours, height=0.7)
        for place, row in enumerate(rows):
            text = "no figure" if row["in_p"] is None else f"{row['in_p']:.1f}"
            panel.annotate(
                text, (values[place], place), (3, 0), textcoords="offset points", va="center"
            )
        panel.set_title(dtype)
        panel.set_xlabel("time of a step, in P")
        panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        panel.set_xlim(0, max(values, default=1.0) * 1.12 or 1.0)
        panel.grid(axis="x", color=FAINT)
        panel.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    save(figure, path)


def draw_error(heads: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Dots of the errors against float64, a panel per kind of error."""
    kinds = {
        "logp_error": "largest error of a sequence's log-prob, in nats",
        "dhidden_error": "relative error of hidden's gradient",
        "dweight_error": "relative error of the weight's gradient",
    }
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(11.5, 4.2), sharey=True)
    markers = {"fp32": "o", "bf16": "D"}
    for panel, (field, title) in zip(panels, kinds.items(), strict=True):
        for dtype, rows in heads.items():
            rows = _in_order(rows)
            found = [(place, row) for place, row in enumerate(rows) if row[field]]
            panel.scatter(
                [row[field] for _, row in found],
                [place for place, _ in found],
                c=[OURS if CANDIDATES[row["candidate"]].ours else _PEER for _, row in found],
                marker=markers[dtype],
                s=28,
            )
            panel.scatter([], [], c="#444444", marker=markers[dtype], s=28, label=dtype)
        panel.set_xscale("log")
        panel.set_xlabel(title)
        panel.set_yticks(range(len(rows)), [row["candidate"] for row in rows])
        panel.tick_params(axis="y", length=0)
        panel.grid(color=FAINT)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, frameon=False)
    save(figure, path, top=0.94)


def draw_sweep(rows: Sequence[Row], path: Path) -> None:
    """Extra peak memory over V and over T."""
    axes = {"vocab": "vocabulary V", "length": "sequence length T"}
    figure, panels = pyplot.subplots(1, len(axes), figsize=(9.5, 3.8), sharey=True)
    for panel, (axis, title) in zip(panels, axes.items(), strict=True):
        ticks = sorted({row[axis] for row in rows if row["axis"] == axis})
        for name in IN_SWEEP:
            mine = [row for row in rows if row["axis"] == axis and row["candidate"] == name]
            mine = [row for row in mine if row["extra_bytes"] is not None]
            mine.sort(key=itemgetter(axis))
            colour, line, marker = LINES[name]
            panel.plot(
                [row[axis] for row in mine],
                [max(row["extra_bytes"] / 2**20, 1.0) for row in mine],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                label=name,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(ticks, [thousands(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel(title)
        panel.grid(color=FAINT)
    panels[0].set_ylabel("extra peak memory, MiB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    save(figure, path, top=0.93)


def _in_order(rows: Sequence[Row]) -> list[Row]:
    known = list(CANDIDATES)
    return sorted(rows, key=lambda row: known.index(row["candidate"]))


def thousands(value: int) -> str:
    return f"{value // 1000}k" if value % 1000 == 0 else str(value)


def save(figure: Any, path: Path, top: float = 1.0) -> None:
    figure.tight_layout(rect=(0, 0, 1, top))
    # No software version in the file: the same figures give the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


_COMPARED = ("ours: local", "ours: recompute", "TRL")


def draw_shares(rows: Sequence[Row], path: Path) -> None:
    """Speedup over eager, and time in P with its quartiles, over the share of labelled tokens."""
    panels: dict[str, Callable[[Row, Row], tuple[float, ...]]] = {
        "times as fast as eager": lambda row, eager: (eager["ms"] / row["ms"],),
        "time of a step, in P": lambda row, _: (row["in_p"], *row["in_p_quartiles"]),
    }
    _draw_lines(rows, path, "labelled tokens", _share, "{:.0%}".format, panels)


def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Time in P with its quartiles over the labelled rows."""
    panels: dict[str, Callable[[Row, Row], tuple[float, ...]]] = {
        "time of a step, in P": lambda row, _: (row["in_p"], *row["in_p_quartiles"]),
    }
    _draw_lines(
        rows,
        path,
        "labelled rows",
        lambda row: row["labelled_rows"],
        lambda tick: thousands(int(tick)),
        panels,
    )


def _draw_lines(
    rows: Sequence[Row],
    path: Path,
    label: str,
    place: Callable[[Row], float],
    shown: Callable[[float], str],
    panels: Mapping[str, Callable[[Row, Row], tuple[float, ...]]],
) -> None:
    good = [row for row in rows if row["status"] == "ok" and row["in_p"] is not None]
    eager = {place(row): row for row in good if row["candidate"] == "eager"}
    with pyplot.rc_context(STYLE):
        width = 4.8 * len(panels)
        figure, axes = pyplot.subplots(1, len(panels), figsize=(width, 3.8), squeeze=False)
        for panel, (title, value) in zip(axes[0], panels.items(), strict=True):
            for name in _compared(good):
                mine = sorted((row for row in good if row["candidate"] == name), key=place)
                mine = [row for row in mine if place(row) in eager or not eager]
                places = [place(row) for row in mine]
                values = [value(row, eager.get(place(row), row)) for row in mine]
                colour, line, marker = LINES.get(name, LINES[_alias(name)])
                style = {"color": colour, "linestyle": line, "marker": marker, "label": name}
                middle = [entry[0] for entry in values]
                spread = None
                if values and len(values[0]) == 3:
                    spread = [
                        [max(0.0, entry[0] - entry[1]) for entry in values],
                        [max(0.0, entry[2] - entry[0]) for entry in values],
                    ]
                panel.errorbar(places, middle, yerr=spread, capsize=3, markersize=4, **style)
                panel.set_xticks(places, [shown(tick) for tick in places])
            panel.set_xlabel(label)
            panel.set_ylabel(title)
            panel.set_ylim(bottom=0)
            panel.grid(color=FAINT)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        save(figure, path, top=0.92)


def _compared(rows: Sequence[Row]) -> list[str]:
    """Ours that train the head, and TRL, in the order in which they stand."""
    names = dict.fromkeys(row["candidate"] for row in rows)
    return [name for name in names if name.split(",")[0] in _COMPARED and "torch" not in name]


def _alias(name: str) -> str:
    """Whose line a path of ours is drawn with."""
    return "ours: auto" if name.startswith("ours: local") else "ours: recompute"


def _share(row: Row) -> float:
    return row["labelled_rows"] / (row["sequences"] * row["length"])


def draw_masses(content: Mapping[str, Any], path: Path) -> None:
    """Error over share kept, and time over ε."""
    with pyplot.rc_context(STYLE):
        figure, (errors, times) = pyplot.subplots(1, 2, figsize=(9.5, 3.8))
        _draw_panels(content, errors, times)
        legends_below(figure)
        save(figure, path)


def _draw_panels(content: Mapping[str, Any], errors: Any, times: Any) -> None:
    colours = {"held-out": OURS, "seen": _OTHER}
    for text, colour in colours.items():
        rows = [
            row for row in content["rows"] if row["order"] == "frequency" and row["text"] == text
        ]
        ours = [r for r in rows if r["method"] == "drop_mass" and r["part"] == PART]
        filters = [r for r in rows if r["method"] == "filter, rows by target"]
        for found, line, marker, name in (
            (ours, "-", "o", f"drop_mass, {text} text"),
            (filters, ":", "^", f"filter by tiles, {text} text"),
        ):
            shares = [row["kept"] for row in found]
            errors.plot(
                shares,
                [row["hidden_error"] for row in found],
                line,
                marker=marker,
                color=colour,
                label=name,
                markersize=4,
            )
        for order, line in (("frequency", "-"), ("tokenizer", "--")):
            chosen = [
                row
                for row in content["times"]
                if (row["path"], row["order"], row["text"]) == ("recompute", order, text)
            ]
            drops = [row["drop_mass"] or DROPS[0] / 4 for row in chosen]
            label = f"{text} text, {order} order"
            in_p = [row["in_p"] for row in chosen]
            times.plot(drops, in_p, line, marker="o", color=colour, label=label, markersize=4)
    errors.set_yscale("log")
    errors.set_title("Error at equal work")
    errors.set_xlabel("share of (row, part) or tiles kept")
    errors.set_ylabel("relative error of d hidden")
    times.set_xscale("log")
    times.set_title("Time of a step (recompute)")
    times.set_xlabel("ε (leftmost: exact)")
    times.set_ylabel("P")
    times.set_ylim(bottom=0)
    for panel in (errors, times):
        panel.grid(color=FAINT)


def draw_trainer(rows: Sequence[Row], path: Path) -> None:
    """Bars of the time and of the peak memory, a colour for what trains."""
    panels = {"ms": ("s a step", 1e3), "extra_bytes": ("GiB of a step's peak", 2**30)}
    colours = {"all": OURS, "adapter": _OTHER}
    names = list(EVERYWHERE)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(9.5, 3.2), sharey=True)
        for panel, (field, (title, unit)) in zip(axes, panels.items(), strict=True):
            for place, (trains, colour) in enumerate(colours.items()):
                shown = [row for row in rows if row["trains"] == trains and row[field] is not None]
                panel.barh(
                    [names.index(row["candidate"]) + 0.36 * (place - 0.5) for row in shown],
                    [row[field] / unit for row in shown],
                    height=0.34,
                    color=colour,
                    label=f"{trains} trained",
                )
            layers = {row["layers"] for row in rows if row[field] is not None}
            panel.set_title(" and ".join(f"{count} layers" for count in sorted(layers)))
            panel.set_xlabel(title)
            panel.grid(axis="x", color=FAINT)
            panel.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=2, frameon=False)
        save(figure, path, top=0.92)


def draw_replay(rows: Sequence[Row], path: Path) -> None:
    """Predicted milliseconds of ours and TRL's, a panel a machine."""
    found = {(row["gpu"], row["shape"], row["candidate"], row["sequences"]): row for row in rows}
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(MACHINES), 1, figsize=(8.5, 6.0))
        for panel, machine in zip(axes, MACHINES, strict=True):
            steps = [(shape, trains) for shape in HEADS.values() for trains in DEFAULTS]
            for side, (names, colour) in enumerate(((DEFAULTS, OURS), (OF_TRL, _OTHER))):
                keys = [(machine.name, s.name, names[t].name, s.sequences) for s, t in steps]
                times = [found[key]["ms"] / found[key]["p_ms"] for key in keys]
                places = [place + 0.4 * side for place in range(len(steps))]
                panel.bar(places, times, 0.4, color=colour, label=("ours", "TRL")[side])
            named = [f"{shape.name}\n{trains}" for shape, trains in steps]
            panel.set_xticks([place + 0.2 for place in range(len(named))], named, fontsize=7)
            panel.set_title(machine.name)
            panel.set_ylabel("predicted time of a step, in P")
            panel.grid(axis="y", color=FAINT)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=2, frameon=False)
        save(figure, path, top=0.94)


# Colour, line, marker and width: ours lies below those that reach as far.
HEAD_LINES = {
    "ours": ("#56b4d3", "-", "o", 4.5),
    "TRL": (_OTHER, "--", "^", 1.5),
    "Liger": ("#8a6bb8", "-", "s", 1.5),
    "eager": ("#6b6b6b", "-", "D", 1.5),
}


def draw_longest(rows: Sequence[Row], path: Path) -> None:
    """The longest context over the number of GPUs, a panel for each kind of GPU and model."""
    models = list(dict.fromkeys(row["shape"] for row in rows))
    with pyplot.rc_context(STYLE):
        size = (3.3 * len(models), 3.0 * len(MACHINES))
        figure, axes = pyplot.subplots(
            len(MACHINES), len(models), figsize=size, sharex="col", sharey=True
        )
        for panels, machine in zip(axes, MACHINES, strict=True):
            for panel, model in zip(panels, models, strict=True):
                for name, (colour, line, marker, width) in HEAD_LINES.items():
                    row = next(
                        row
                        for row in rows
                        if (row["candidate"], row["gpu"], row["shape"])
                        == (name, machine.name, model)
                    )
                    found = zip(row["gpus"], row["longest"], strict=True)
                    places, values = zip(*(each for each in found if each[1]), strict=True)
                    style = {"color": colour, "linestyle": line, "marker": marker}
                    wide = {"linewidth": width, "markersize": 3 + width}
                    panel.plot(places, values, **style, **wide, label=name)
                panel.set_title(f"{model}, {machine.name}")
                panel.set_xscale("log", base=2)
                panel.set_yscale("log", base=2)
                counts = [gpus for gpus in GPUS if gpus >= min(places) / 2]
                panel.set_xticks(counts, [str(gpus) for gpus in counts])
                ticks = {2**power: _tokens(2**power) for power in range(11, 26, 2)}
                panel.set_yticks(list(ticks), list(ticks.values()))
                panel.minorticks_off()
                panel.grid(color=FAINT)
        for panel in axes[-1]:
            panel.set_xlabel("GPUs")
        for panels in axes:
            panels[0].set_ylabel("longest context, tokens")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        save(figure, path, top=0.95)


def _tokens(count: int) -> str:
    return f"{count // 2**10}k" if count < 2**20 else f"{count // 2**20}M"


def draw_step(
    examples: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]],
    limits: Mapping[str, float],
    path: Path,
) -> None:
    """Stacked bars of a step's bytes at the head, by head, beside those of a layer's backward.

    Args:
        examples: of each panel its title, and GB of each bar by what they are.
        limits: GB that a step may take, by GPU.
    """
    colours = {
        "weights, gradients, optimizer": "#b9c2c9",
        "checkpoints": FAINT,
        "gathered weights, last norm": "#e7c9a4",
        "head": OURS,
        "layer": _OTHER,
    }
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(len(examples), 1, figsize=(9.0, 2.0 * len(examples)))
        for panel, (title, bars) in zip(axes, examples, strict=True):
            for place, parts in enumerate(bars.values()):
                left = 0.0
                for name, size in parts.items():
                    panel.barh(place, size, 0.7, left, color=colours[name], label=name)
                    left += size
                text = f"{left:.0f}"
                panel.annotate(text, (left, place), (3, 0), textcoords="offset points", va="center")
            for name, limit in limits.items():
                panel.axvline(limit, color="#444444", linestyle=":", linewidth=1)
                panel.annotate(
                    name,
                    (limit, 1),
                    (0, 2),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
            panel.set_yticks(range(len(bars)), list(bars))
            panel.invert_yaxis()
            panel.set_title(title, pad=12)
            panel.grid(axis="x", color=FAINT)
            panel.tick_params(axis="y", length=0)
        axes[-1].set_xlabel("GB of a GPU at the head, and in the backward of a layer")
        found: dict[str, Any] = {}
        for panel in axes:
            found |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        named = [(found[name], name) for name in colours]
        figure.legend(*zip(*named, strict=True), loc="upper center", ncols=5, frameon=False)
        save(figure, path, top=0.96)
