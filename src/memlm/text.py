"""Text for people: what strangers wrote made safe to print, and numbers of things."""

from __future__ import annotations

import unicodedata


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number of things; their plural ends in s if it is not given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def printable(text: str) -> str:
    """Return text that cannot move the cursor or turn the reading direction: control characters made visible."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_printable_character(character) for character in text.replace("\r\n", "\n"))


def _printable_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of control characters
    if code in (0x7F, 0x2028, 0x2029):
        return "␡" if code == 0x7F else "↵"
    # Overrides and isolates of the reading direction would reorder what stands beside them.
    hidden = unicodedata.category(character) in ("Cc", "Cs") or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return "\ufffd" if hidden else character
