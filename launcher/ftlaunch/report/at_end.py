"""What the end of a run leaves for its readers: a page, and cards of what it has made. A job calls it as a module."""

import sys
from pathlib import Path

from ftlaunch.errors import UserError
from ftlaunch.report.facts import read_run
from ftlaunch.report.model_card import write_cards
from ftlaunch.report.write import write_report
from ftlaunch.run.layout import RunDir


def leave_report(run: RunDir) -> None:
    """Write the report of a run, however it ended, and the cards of what it has made."""
    try:
        page = write_report(run, with_plots=False)
        write_cards(run, read_run(run))
    # The exit code is that of the run. A disk too full for the report does not turn a trained model into a failure.
    except (OSError, UserError) as error:
        print(f"there is no report of {run.path.name}: {error}", file=sys.stderr)
    else:
        print(f"report: {page}", file=sys.stderr)


if __name__ == "__main__":
    leave_report(RunDir(Path(sys.argv[1])))
