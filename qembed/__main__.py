"""`python -m qembed`: the `qembed` command."""

from qembed.cli import main

main()
