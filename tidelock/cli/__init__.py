"""The command line: one thin file per command, each with `add(subparsers)` and `run(args) -> dict | None`."""
