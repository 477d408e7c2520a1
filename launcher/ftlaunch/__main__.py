"""The entry point, of `ftlaunch` and of `python -m ftlaunch`."""

import sys

from ftlaunch import __version__

HELP = __file__.replace("__main__.py", "help.txt")


def main() -> None:
    """Print the help or the version where nothing else is asked for, else run the command line.

    The help is a file, which a test holds equal to what typer would say: importing typer takes longer than all of this.
    """
    asked = sys.argv[1:]
    # Only these calls: `ftlaunch run --help` is for typer.
    if asked in ([], ["-h"], ["--help"]):
        with open(HELP, encoding="utf-8") as file:  # noqa: PTH123 (pathlib would have to be imported)
            (sys.stdout if asked else sys.stderr).write(file.read())
        sys.exit(0 if asked else 2)  # no verb at all is a wrong call, errors.BAD_INPUT
    if asked == ["--version"]:
        print(f"ftlaunch {__version__}")
        sys.exit(0)
    from ftlaunch import cli

    cli.main()


if __name__ == "__main__":
    main()
