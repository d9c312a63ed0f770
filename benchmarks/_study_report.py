"""The rows of the study in; its CSV, its table and its picture out."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._environment import environment, listed
from benchmarks._study_arms import BARS, BARS_OF_SMALL_VOCABULARY, DENSE, DENSE_FORWARD_KL, SFT, Arm, cached

Row = dict[str, Any]

MEASURED = ("bytes_per_target", "forward_kl", "reverse_kl", "cross_entropy", "calibration_error")


def write_report(rows: Sequence[Row], path: Path, settings: dict[str, Any]) -> str:
    """Write path.csv, path.md and path.svg; return the table."""
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    means = summarise(rows)
    bars = BARS if settings["vocab"] >= 4096 else BARS_OF_SMALL_VOCABULARY
    table = "\n".join([_table(means), "", *_bars(means, bars)])
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    text = f"# {path.name}\n\n```\n{listed(environment())}\nsettings: {chosen}\n```\n\n{table}\n"
    path.with_suffix(".md").write_text(text)
    draw(means, path.with_suffix(".svg"))
    return table


def arm_of(row: Row) -> Arm:
    """Return the arm that a row was measured with."""
    fields = Arm.__dataclass_fields__
    texts: Row = {name: row[name] for name in fields if name in row}  # rows of old have no later settings
    numbers = {name: int(texts[name]) for name in ("seed", "k", "samples")}
    settings = {name: float(texts[name]) for name in ("temperature", "kd_weight", "tail_weight", "drawn_at")}
    return Arm(**texts | numbers | settings)


def summarise(rows: Sequence[Row], names: Sequence[str] = MEASURED, share_of: str = "forward_kl") -> list[Row]:
    """Return the means and deviations over seeds of the named measures, and the share recovered.

    That is of what dense ToDi gains over SFT in `share_of`, by seed and averaged; seeds of which either is missing
    count for the other measures alone.
    """
    measured = {_key(row): float(row[share_of]) for row in rows}
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["start"], arm_of(row).label].append(row)
    means = []
    for (start, label), members in groups.items():
        mean: Row = {"start": start, "label": label, "arm": arm_of(members[0]), "seeds": len(members)}
        for name in names:
            values = [float(row[name]) for row in members]
            mean[name], mean[f"{name}_deviation"] = statistics.mean(values), statistics.pstdev(values)
        shares = [share for row in members if (share := _share(row, measured)) is not None]
        mean["share"] = statistics.mean(shares) if shares else None
        mean["share_deviation"] = statistics.pstdev(shares) if shares else None
        means.append(mean)
    return means


def _key(row: Row) -> tuple[str, str, str]:
    return row["start"], str(row["seed"]), arm_of(row).label


def _share(row: Row, measured: dict[tuple[str, str, str], float]) -> float | None:
    start, seed, _ = _key(row)
    plain, dense = measured.get((start, seed, SFT.label)), measured.get((start, seed, DENSE.label))
    if plain is None or dense is None:
        return None
    return (plain - measured[_key(row)]) / (plain - dense)


def _table(means: Sequence[Row]) -> str:
    columns = ("start", "trained on", "bytes a target", "forward KL", "share recovered", "reverse KL", "cross-entropy")
    header = "| " + " | ".join((*columns, "ECE", "seeds")) + " |"
    lines = [header, "|---" * 9 + "|"]
    for mean in sorted(means, key=lambda mean: (mean["start"] != "warm", mean["forward_kl"])):
        share = "" if mean["share"] is None else f"{mean['share']:.1%}{_deviation(mean, 'share', '.1%')}"
        size = f"{mean['bytes_per_target']:.1f}" if mean["bytes_per_target"] else "–"
        lines.append(
            f"| {mean['start']} | {mean['label']} | {size} | {mean['forward_kl']:.4f}"
            f"{_deviation(mean, 'forward_kl', '.4f')} | {share} | {mean['reverse_kl']:.4f} | "
            f"{mean['cross_entropy']:.4f} | {mean['calibration_error']:.4f} | {mean['seeds']} |"
        )
    return "\n".join(lines)


def _deviation(mean: Row, name: str, digits: str) -> str:
    """Return what follows a mean; a single seed has no deviation."""
    return f" ± {mean[f'{name}_deviation']:{digits}}" if mean["seeds"] > 1 else ""


def _bars(means: Sequence[Row], bars: dict[tuple[int, int], float]) -> list[str]:
    """Say which of the project's bars these rows meet."""
    found = {mean["label"]: mean["share"] for mean in means if mean["start"] == "warm" and mean["share"] is not None}
    lines = []
    for (k, samples), bar in bars.items():
        label = cached(k, samples).label
        if label in found:
            verdict = "met" if found[label] >= bar else "missed"
            lines.append(
                f"- {label}, warm: {found[label]:.1%} of what dense ToDi gains, {bar:.0%} asked for: {verdict}"
            )
    return lines


def draw(means: Sequence[Row], file: Path, measures: Sequence[str] = ("forward_kl",)) -> None:
    """Draw measures against bytes a target, a panel a start: a line for each tail over K, a level for each dense arm.

    Only arms of ToDi at T = 1 and w = 0.5, and the references of the field; the table has the others.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 8}
    from matplotlib import pyplot

    starts = sorted({mean["start"] for mean in means}, reverse=True)
    drawn = [(start, measure) for measure in measures for start in starts]
    columns = min(len(drawn), 2)
    rows = -(-len(drawn) // columns)
    size = (6 * columns, 4.2 * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    colours = {name: f"C{number}" for number, name in enumerate(sorted(_series(means)))}
    handles: dict[str, Any] = {}
    for panel, (start, measure) in zip(panels.flat, drawn, strict=True):
        _draw_panel(panel, [mean for mean in means if mean["start"] == start], measure, colours)
        handles |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
        panel.set(title=f"{start} student", xlabel="bytes a target (numbers at points: K)")
        panel.set_ylabel(f"held-out {measure.replace('_kl', ' KL')} to the teacher, nats")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2 * columns, fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def _draw_panel(panel: Any, means: Sequence[Row], measure: str, colours: dict[str, str]) -> None:
    from matplotlib.ticker import ScalarFormatter

    levels = [mean for mean in means if mean["label"] in (SFT.label, DENSE.label, DENSE_FORWARD_KL[0].label)]
    levels = sorted(levels, key=lambda mean: mean[measure])
    for number, mean in enumerate(levels):
        panel.axhline(mean[measure], linestyle="--", linewidth=0.8, color="grey")
        at = (1.01, mean[measure])  # beside the panel; of two levels that are as high, the label of the lower hangs
        panel.annotate(
            mean["label"], at, xycoords=("axes fraction", "data"), fontsize=7, va="bottom" if number else "top"
        )
    for name, members in _series(means).items():
        columns = ((m["bytes_per_target"], m[measure], m[f"{measure}_deviation"]) for m in members)
        x, y, error = zip(*columns, strict=True)
        style = "o-" if members[0]["arm"].targets == "cached" else "x"
        panel.errorbar(x, y, yerr=error, fmt=style, markersize=4, capsize=2, label=name, color=colours[name])
        for mean in members if style == "o-" else ():
            at = mean["bytes_per_target"], mean[measure]
            panel.annotate(mean["arm"].k, at, xytext=(3, 4), textcoords="offset points", fontsize=6)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_xticks([10, 20, 50, 100, 200])
    panel.minorticks_off()


def _series(means: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each line or point that is drawn, by name, K rising."""
    found: dict[str, list[Row]] = defaultdict(list)
    for mean in sorted(means, key=lambda mean: mean["arm"].k):
        arm: Arm = mean["arm"]
        plain = cached(arm.k, arm.samples, tail=arm.tail, encoding=arm.encoding, start=arm.start, seed=arm.seed)
        if arm == plain:
            tail = f"{arm.samples} samples" if arm.tail == "sampled" else arm.tail.replace("none", "no tail")
            found[f"ToDi, {tail}" + (f", {arm.encoding}" if arm.encoding != "f16" else "")].append(mean)
        elif arm.targets in ("renormalised", "random"):
            found[arm.label].append(mean)
    return found
