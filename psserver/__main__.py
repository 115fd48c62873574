"""Run the command line: ``python -m psserver``."""

from psserver.cli import main

main()
