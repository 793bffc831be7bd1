"""Names of the rows of the table."""

KNOWN = "facts"
ROLLED = "facts, table rolled by one slot"
UNREAD = "slots that no fact reads"
BEFORE = "new facts before they are learned"
NEW, OLD = "new facts", "old facts"
ALL = "all parameters"
TABLE = "the whole table"
CHOSEN = "slots by TF-IDF"
RANDOM = "slots at random"
WAYS = (ALL, TABLE, CHOSEN, RANDOM)  # to learn new facts


def after(facts: str, way: str) -> str:
    """Return the row of old or new facts after new ones were learned in some way."""
    return f"{facts} after training {way}"


ROWS = (KNOWN, ROLLED, UNREAD, BEFORE, *(after(facts, way) for way in WAYS for facts in (NEW, OLD)))
