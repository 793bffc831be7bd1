"""A comparison as Markdown, and as a page with plots that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from ._comparison import Comparison, Row, percentages
from ._report_style import STYLE

_HEADER = (
    "method",
    "perplexity",
    "to fixed λ (95 % interval)",
    "to the tuned cache",
    "helped",
    "hurt",
    "searched",
    "tokens/s",
    "λ shuffled",
    "parameters",
    "fit",
)


def markdown(comparison: Comparison) -> str:
    """Return the table, and where the gain comes from."""
    settings = comparison.settings
    lines = [
        f"{settings['model']}, {settings['memory']['entries']:,} entries, cache of {settings['cache']:,} tokens; "
        f"{comparison.tokens:,} test tokens, fitted to {comparison.valid_tokens:,}; intervals over {comparison.unit}.",
        "",
        "| " + " | ".join(_HEADER) + " |",
        "|---" * len(_HEADER) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in comparison.rows),
        "",
        *_skipping(comparison),
        "",
    ]
    analysis = comparison.analysis
    groups = ("stored so often", analysis.by_frequency), ("tokens before it that agree", analysis.by_overlap)
    for title, rows in groups:
        methods = [name for name in rows[0] if name not in ("group", "tokens")] if rows else []
        lines += [f"| {title} | tokens | " + " | ".join(f"{name}, nats" for name in methods) + " |"]
        lines += ["|---" * (len(methods) + 2) + "|"]
        for row in rows:
            gains = " | ".join(f"{row[name]:+.3f}" for name in methods)
            lines.append(f"| {row['group']} | {row['tokens']:,} | {gains} |")
        lines.append("")
    return "\n".join(lines)


def _skipping(comparison: Comparison) -> list[str]:
    """Say what the learned weight costs and saves where it skips searches."""
    curve = ", ".join(f"{row['skipped']:.0%} → {row['perplexity']:,.2f}" for row in comparison.skipping[::4])
    if not curve:
        return ["Learned weight: none was fitted, since no token of the text to fit to found a neighbor."]
    saving = [] if comparison.saving is None else [f"{comparison.saving}."]
    return [f"Learned weight, perplexity with the searches of the smallest λ skipped: {curve}.", *saving]


def _cells(row: Row) -> list[str]:
    fixed, cache = percentages(row)
    return [
        row.method,
        f"{row.perplexity:,.2f}",
        fixed,
        cache.split(" (")[0],
        f"{row.helped:.0%}",
        f"{row.hurt:.0%}",
        f"{row.searched:.0%}",
        f"{row.tokens_per_second:,.0f}",
        "" if row.shuffled is None else f"{row.shuffled:,.2f}",
        f"{row.parameters:,}" if row.parameters else "",
        f"{row.fit_seconds:.1f} s" if row.fit_seconds else "",
    ]


def page(comparison: Comparison) -> str:
    """Return a page with the table and the plots."""
    header = "".join(f"<th>{html.escape(name)}</th>" for name in _HEADER)
    rows = "".join(
        f'<tr title="{html.escape(row.settings)}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row))
        + "</tr>"
        for row in comparison.rows
    )
    best = min(comparison.rows, key=lambda row: row.perplexity)
    settings = comparison.settings
    image = base64.b64encode(plots(comparison)).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>memlm: ways to choose λ</title><style>{STYLE}</style>
<h1>When to trust the memory</h1>
<p class="big">Lowest perplexity: <b>{html.escape(best.method)}</b> with {best.perplexity:,.2f}; the model alone
{comparison.row("lm").perplexity:,.2f}, fixed λ {comparison.row("knn-lm").perplexity:,.2f}</p>
<div class="wide"><table><tr>{header}</tr>{rows}</table></div>
<p>{html.escape(settings["model"])} with {settings["memory"]["entries"]:,} entries and a cache of
{settings["cache"]:,} tokens. Fitted to {comparison.valid_tokens:,} tokens of other text; {comparison.tokens:,} test
tokens; intervals over {html.escape(comparison.unit)}. Hover over a row for what was fitted. <i>λ shuffled</i> gives
every token the weight of another one: what is left of a gain there did not come from λ.</p>
<p>{html.escape(" ".join(_skipping(comparison)))}</p>
<img alt="λ against distance with buckets, curves and the best weight; reliability of λ; gain by frequency of the token;
gain by overlap with the nearest neighbor" src="data:image/png;base64,{image}">
</html>
"""


def plots(comparison: Comparison) -> bytes:
    """Draw λ against distance, reliability, and the gain by frequency and by overlap; return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    (curves, reliability), (frequency, overlap) = figure.subplots(2, 2)
    _draw_curves(curves, comparison.analysis.curves)
    for name, points in comparison.analysis.reliability.items():
        if points:
            style = {"marker": "o", "ms": 4, "lw": 1.2, "label": name}
            reliability.plot([row["mean"] for row in points], [row["best"] for row in points], **style)
    reliability.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1)
    reliability.set(xlabel="mean λ of a tenth of the tokens", ylabel="best λ there", title="Reliability of λ")
    _legend(reliability)
    _draw_bars(frequency, comparison.analysis.by_frequency, "times that the target is stored", "Gain by frequency")
    label = "tokens before it that agree with the nearest neighbor's"
    _draw_bars(overlap, comparison.analysis.by_overlap, label, "Gain by overlap")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _draw_curves(axes: Any, curves: dict[str, list[float]]) -> None:
    axes.set(xlabel="squared distance to the nearest neighbor", ylabel="λ", title="λ against distance")
    axes.grid(alpha=0.3)
    if not curves:
        return
    axes.plot(curves["middle"], curves["best λ"], "ko", ms=4, label="best λ on test, in twentieths")
    styles = {"buckets": {"drawstyle": "steps-mid"}, "exponential": {"lw": 2}, "logistic": {"ls": "--"}}
    for name, style in styles.items():
        if name in curves:
            axes.plot(curves["distance"], curves[name], label=f"{name}, fitted on valid", **style)
    axes.set_ylim(-0.03, 1.03)
    _legend(axes)


def _draw_bars(axes: Any, rows: list[dict[str, Any]], label: str, title: str) -> None:
    methods = [name for name in rows[0] if name not in ("group", "tokens")] if rows else []
    for place, method in enumerate(methods):
        positions = [number + (place - 1) * 0.27 for number in range(len(rows))]
        axes.bar(positions, [row[method] for row in rows], width=0.25, label=method)
    axes.set_xticks(range(len(rows)), [f"{row['group']}\n{row['tokens']:,}" for row in rows], fontsize=7)
    axes.axhline(0, color="0.4", lw=1)
    axes.set(xlabel=f"{label} (below: tokens)", ylabel="nats gained over the model", title=title)
    axes.grid(alpha=0.3, axis="y")
    _legend(axes)


def _legend(axes: Any) -> None:
    """Name what is drawn, if anything is: a text may be too short for points."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
