"""One page with the table, the plots and explained passages of an evaluation; it needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from ..datastore import Datastore
from ..documents import Document
from ..files import write_atomically
from ._evaluate import Evaluation
from ._explanation import Explanation
from ._explanation_html import explanation_page
from ._report_style import STYLE
from ._tune import Tuning


def write_report(
    path: Path,
    name: str,
    memory: Datastore,
    tuning: Tuning,
    evaluation: Evaluation,
    documents: list[Document],
    explanations: list[Explanation],
) -> None:
    """Write the page, in one step.

    Args:
        path: Of the page.
        name: Of the model.
        memory: The datastore.
        tuning: How λ, temperature and k were chosen.
        evaluation: On test text.
        documents: The test text, in the evaluation's order.
        explanations: Passages to show.
    """
    alone, mixed = evaluation.results[0], evaluation.results[-1]
    rows = "".join(
        f"<tr><td>{html.escape(item.method)}</td><td>{item.perplexity:,.2f}</td><td>{item.bits_per_byte:.3f}</td>"
        f"<td>{item.tokens_per_second:,.0f}</td></tr>"
        for item in evaluation.results
    )
    frames = "".join(
        f'<h2>{html.escape(item.title)}</h2><iframe title="{html.escape(item.title)}" '
        f'srcdoc="{html.escape(explanation_page(item))}"></iframe>'
        for item in explanations
    )
    write_atomically(
        path,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>memlm: {html.escape(name)} with a memory</title><style>{STYLE}</style>
<h1>{html.escape(name)} with a memory of {len(memory):,} tokens</h1>
<p class="big">Perplexity per token on held-out text: {alone.perplexity:,.2f} → <b>{mixed.perplexity:,.2f}</b>
({100 * (mixed.perplexity / alone.perplexity - 1):+.0f} %)</p>
<table><tr><th>method</th><th>perplexity / token</th><th>bits / byte</th><th>tokens / s</th></tr>{rows}</table>
<p>{html.escape(str(evaluation).splitlines()[-1])}.</p>
<p>Chosen on other held-out text: {html.escape(tuning.verdict())}.</p>
<img alt="Perplexity against temperature for several k, and perplexity of every test document with and without memory"
src="data:image/png;base64,{base64.b64encode(plots(tuning, evaluation, documents)).decode()}">
{frames}
</html>
""",
    )


def plots(tuning: Tuning, evaluation: Evaluation, documents: list[Document]) -> bytes:
    """Draw tuning and test results side by side; return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    ks = sorted({int(row["k"]) for row in tuning.grid})
    for number, k in enumerate(ks[-1::-3][:4]):
        rows = sorted((row for row in tuning.grid if row["k"] == k), key=lambda row: row["temperature"])
        shade = f"C{number}"
        left.plot([row["temperature"] for row in rows], [row["perplexity"] for row in rows], shade, label=f"k = {k}")
    left.axhline(tuning.lm_perplexity, color="0.4", ls="--", lw=1, label="model alone")
    left.plot(
        min(tuning.grid, key=lambda row: row["perplexity"])["temperature"],
        tuning.perplexity,
        "k*",
        ms=11,
        label=f"chosen, {tuning.best.describe()}",
    )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="temperature",
        ylabel="perplexity per token",
        title="Tuning on valid (best λ for each point)",
    )
    left.legend(frameon=False, fontsize=8)

    points = document_perplexities(evaluation)
    right.scatter(points[:, 0], points[:, 1], s=22, alpha=0.8)
    low, high = points.min() * 0.8, points.max() * 1.2
    right.plot([low, high], [low, high], color="0.4", ls="--", lw=1)
    ratio = points[:, 1] / points[:, 0]
    for number, side in ((int(ratio.argmin()), (-6, -10)), (int(ratio.argmax()), (-6, 4))):
        if number < len(documents):
            label = documents[number].id
            right.annotate(label, points[number], fontsize=7, ha="right", xytext=side, textcoords="offset points")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="perplexity of the model alone",
        ylabel="with memory",
        title="Test documents: below the line, memory helps",
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def document_perplexities(evaluation: Evaluation) -> Any:
    """Return (model alone, with memory) for every document, float64, shape (documents, 2)."""
    counts = np.maximum(np.bincount(evaluation.documents), 1)
    nats = [
        np.bincount(evaluation.documents, -values) / counts
        for values in (evaluation.lm_log_probs, evaluation.log_probs)
    ]
    return np.exp(np.stack(nats, axis=1))
