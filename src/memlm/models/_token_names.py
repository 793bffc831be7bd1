"""Which token a server means by a name."""

from __future__ import annotations

from functools import cached_property
from typing import Any

UNKNOWN = -1  # the id of a token that its name does not tell
_PREFIX = "token_id:"
_DIGITS = 10  # more than any id has


class TokenNames:
    """Ids of the names by which servers call a tokenizer's tokens.

    A name is "token_id:17", the vocabulary's own string for a token ("Ġthe"), or the decoded one (" the"). Of one that
    means several tokens, such as "�" for a part of a character, no id is known.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getitem__(self, name: str) -> int:
        """Return the id, or `UNKNOWN`; one that no tokenizer has stands for all such."""
        if self.is_id(name):
            digits = name.removeprefix(_PREFIX).lstrip("0")
            return int(digits or "0") if len(digits) < _DIGITS else 10**_DIGITS
        return self._table.get(name, UNKNOWN)

    def is_id(self, name: str) -> bool:
        """Say whether a name is an id."""
        digits = name.removeprefix(_PREFIX)
        return name.startswith(_PREFIX) and digits.isascii() and digits.isdecimal()

    @cached_property
    def _table(self) -> dict[str, int]:
        ids = list(range(len(self.tokenizer)))
        as_stored = self.tokenizer.convert_ids_to_tokens(ids)
        decoded = self.tokenizer.batch_decode(
            [[number] for number in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        table: dict[str, int] = {}
        for names in (as_stored, decoded):
            for number, name in enumerate(names):
                if table.setdefault(name, number) != number:
                    table[name] = UNKNOWN
        return table
