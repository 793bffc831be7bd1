"""What is measured of an arm."""

ALL = "all tokens"
FAR = "tokens last seen beyond the window"
NEAR = "tokens seen in the window"
NEW = "tokens not seen before"
EMPTY = "all tokens, memory emptied before every segment"
OTHER = "all tokens, memory of another document"
ROWS = (ALL, FAR, NEAR, NEW, EMPTY, OTHER)
