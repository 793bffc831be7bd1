"""Printing text as it is generated."""

from __future__ import annotations

import sys

from transformers import TextStreamer

from ..text import printable


class PrintableStreamer(TextStreamer):
    """Prints tokens as they come; a stored document must not teach the model to steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text."""
        sys.stdout.write(printable(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()
