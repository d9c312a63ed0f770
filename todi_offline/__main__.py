"""`python -m todi_offline`: the same commands as `todi`, for launchers that start a module."""

from todi_offline.commands.cli import main

main()
