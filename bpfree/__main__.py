"""`python -m bpfree`: the same as the `bpfree` command."""

from bpfree.cli import main

main()
