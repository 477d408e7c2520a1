"""`python -m ftlaunch`."""

from ftlaunch.cli import main

main()
