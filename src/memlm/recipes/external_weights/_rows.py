"""Names of the rows of the table. All facts but those of KNOWN have names that training has never seen together."""

WRONG = "always wrong, for comparison"
RIGHT = "never wrong, for comparison"
NOTHING = "nothing written"
WRITTEN = "written"
KNOWN = "written, of the names in training"
REPLACED = "replaced, asked for the new value"
OLD = "replaced, asked for the old value"
DELETED = "deleted"
OTHERS = "not deleted, while others are"
VALUES = "written, values rolled by one row"
DEALT = "written, values dealt out anew"
TEXT = "text without facts, hundredths of a nat"

ROWS = (WRONG, RIGHT, NOTHING, WRITTEN, KNOWN, REPLACED, OLD, DELETED, OTHERS, VALUES, DEALT, TEXT)
