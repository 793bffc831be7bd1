"""An explanation in the terminal: the text in color, footnotes, and the documents."""

from __future__ import annotations

import math
import re

from rich.console import Console, Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..text import count, printable
from ._explanation import Explanation, Source

_FOOTNOTES = 8
_DOCUMENTS = 8
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
# Weak changes color the letters, strong ones the ground: middle tones, legible on dark and on light terminals.
_TEAL, _ORANGE = "#0b8693", "#c2570c"
_STYLES = {
    2: _TEAL,
    3: f"#ffffff on {_TEAL}",
    4: f"bold #ffffff on {_TEAL}",
    -2: _ORANGE,
    -3: f"#ffffff on {_ORANGE}",
    -4: f"bold #ffffff on {_ORANGE}",
}


def print_explanation(explanation: Explanation, console: Console | None = None) -> None:
    """Print the text with what memory changed, then where the most helped tokens came from."""
    console = console or Console()
    plain = console.no_color or console.color_system is None
    notes = _footnotes(explanation)
    console.print(Text(printable(explanation.title), style="bold"))
    console.print(_summary(explanation))
    if not explanation.tokens:
        return
    console.print(_legend(plain), "", sep="\n")
    split = explanation.generated_from or 0
    if split:
        console.print(_passage(explanation, 0, split, notes, plain))
        console.print(Rule(Text("the model wrote from here", style="dim"), characters="┈", style="dim"))
    console.print(_passage(explanation, split, len(explanation.tokens), notes, plain), "", sep="\n")
    if notes:
        console.print(_footnote_table(explanation, notes, console.width, plain))
    if explanation.documents:
        console.print(_documents(explanation))
    elif explanation.summarized:
        console.print(Text("No stored token among the neighbors agrees with this text.", style="dim"))


def percent(probability: float) -> str:
    """Return a probability for people."""
    if math.isnan(probability):
        return "–"
    if probability < 1e-4:
        return "<0.01 %"
    digits = 2 if probability < 0.01 else 1 if probability < 0.1 else 0
    return f"{100 * probability:.{digits}f} %"


def _summary(explanation: Explanation) -> Text:
    if not explanation.summarized:
        return Text("No token was scored.")
    alone, together = explanation.perplexity_lm, explanation.perplexity
    settings = " · ".join(
        f"{name}\xa0{value:.4g}" if isinstance(value, float) else f"{name}\xa0{value}"
        for name, value in explanation.settings.items()
    )
    summary = Text.assemble(
        "written by the model: " if explanation.generated_from else "",
        f"{count(len(explanation.summarized), 'token')}, ",
        (f"perplexity per token {alone:,.1f} → {together:,.1f}", "bold"),
        f" ({explanation.gain:+.3f} nats per token); "
        f"helped {percent(explanation.helped)}, hurt {percent(explanation.hurt)}",
    )
    weights = zip(explanation.weights, explanation.memories, strict=False)
    if explanation.weights:
        summary.append(f"\nmean λ {' + '.join(f'{percent(weight)} ({memory})' for weight, memory in weights)}")
    return summary.append(f"\n{printable(settings)}", style="dim") if settings else summary


def _legend(plain: bool) -> Text:
    if plain:
        return Text("⟦from memory⟧   ¹ note")
    return Text.assemble(
        ("from memory", "underline"),
        "   made ",
        (" ×16 ", _STYLES[4]),
        (" ×4 ", _STYLES[3]),
        (" ×2 ", _STYLES[2]),
        "more likely   ",
        (" ×2 ", _STYLES[-2]),
        (" ×4 ", _STYLES[-3]),
        " less likely   ¹ note",
    )


def _footnotes(explanation: Explanation) -> dict[int, int]:
    """Number the most helped token of each stretch from memory, of the stretches with the greatest help."""
    tokens = explanation.tokens

    def help_given(position: int) -> tuple[bool, bool, float]:
        token = tokens[position]
        return bool(token.support), bool(token.text.strip()), token.bits

    first = explanation.generated_from or 0
    stretches = [
        stretch for stretch in explanation.stretches if stretch.document is not None and stretch.start >= first
    ]
    best = [max(range(stretch.start, stretch.stop), key=help_given) for stretch in stretches]
    helped = [position for position in best if tokens[position].level > 0]
    chosen = sorted(sorted(helped, key=lambda position: -tokens[position].bits)[:_FOOTNOTES])
    return {position: number for number, position in enumerate(chosen, 1)}


def _passage(explanation: Explanation, start: int, stop: int, notes: dict[int, int], plain: bool) -> Text:
    stretches = explanation.stretches
    opens, closes = {stretch.start for stretch in stretches}, {stretch.stop - 1 for stretch in stretches}
    from_memory = {position for stretch in stretches for position in range(stretch.start, stretch.stop)}
    passage = Text(tab_size=4, overflow="fold")
    for position in range(start, stop):
        token = explanation.tokens[position]
        text = printable(token.text).replace("\n", "⏎\n") or "∅"
        body = text.strip("⏎\n\t ") or text
        lead, tail = text.split(body, 1)
        # White space gets no ground: bars of indentation would outshine the words.
        level = token.level if token.text.strip() else max(-2, min(token.level, 2))
        color = _STYLES.get(level, "")
        style = f"{color} underline" if position in from_memory and not plain else color
        passage.append(lead, color if position in opens else style)
        passage.append("⟦" if plain and position in opens else "")
        passage.append(body, style)
        passage.append(str(notes.get(position, "")).translate(_SUPERSCRIPTS), "bold")
        passage.append("⟧" if plain and position in closes else "")
        passage.append(tail)
    return passage


def _footnote_table(explanation: Explanation, notes: dict[int, int], width: int, plain: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("token", overflow="fold", max_width=16)
    table.add_column("model → with memory", no_wrap=True)
    several = len(explanation.memories) > 1
    if several:
        table.add_column("λ of each", no_wrap=True)
    table.add_column("of p_kNN", justify="right", no_wrap=True)
    table.add_column("document, stored text", overflow="fold")
    for position, number in notes.items():
        token = explanation.tokens[position]
        source = max((source for source in token.sources if source.token == token.text), key=lambda item: item.share)
        table.add_row(
            Text(str(number), style="bold"),
            Text(_one_line(token.text), style="bold"),
            f"{percent(token.lm)} → {percent(token.mixture)}",
            *([" + ".join(map(percent, token.weights))] if several else []),
            percent(source.share),
            Text.assemble((_one_line(source.document), "bold"), "\n", _context(source, width - 57, plain)),
        )
    return table


def _context(source: Source, width: int, plain: bool) -> Text:
    """Return the stored token between as much of its context as fits into a line."""
    before, after = (re.sub(" {3,}", "  ", printable(text)) for text in (source.before, source.after))
    before, token, after = before.replace("\n", "⏎"), _one_line(source.token), after.replace("\n", "⏎")
    room = min(max(width - len(token), 20), 90)
    cut = room * 3 // 5
    body = token.strip() or token
    lead, tail = token.split(body, 1)
    return Text.assemble(
        "…" + before[-cut:] if len(before) > cut else before,
        lead,
        (f"⟦{body}⟧" if plain else body, f"bold underline {_TEAL}"),
        tail,
        after[: room - cut] + "…" if len(after) > room - cut else after,
    )


def _documents(explanation: Explanation) -> Group:
    documents = explanation.documents
    total = sum(probability for _, probability in documents)
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, probability in documents[:_DOCUMENTS]:
        bar = "━" * max(1, round(24 * probability / documents[0][1]))
        table.add_row(Text(bar, style=_TEAL), percent(probability / total), Text(_one_line(name), overflow="fold"))
    rest = documents[_DOCUMENTS:]
    if rest:
        table.add_row("", percent(sum(value for _, value in rest) / total), Text(f"{len(rest):,} more", style="dim"))
    heading = Text("Where it came from (share of the support that stored tokens gave)", style="bold")
    return Group("", heading, table)


def _one_line(text: str) -> str:
    shown = printable(text).replace("\n", "⏎").replace("\t", "→")
    return (shown if shown.strip() else shown.replace(" ", "␣")) or "∅"
