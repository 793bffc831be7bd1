"""`python -m memlm`: the command line."""

from .cli import main

main()
