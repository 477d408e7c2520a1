"""`ftlaunch merge`, as `python -m fttrain.tools.merge RUN|ARTIFACT|ADAPTER OUT`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ftlaunch.recipe import Merge
from fttrain.merging.merge import find_source, merge
from fttrain.model.scorer import DTYPES
from fttrain.tools.output import answer


def main() -> int:
    parser = argparse.ArgumentParser(prog="ftlaunch merge")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=list(DTYPES))
    options = parser.parse_args()
    return answer(_merged(options))


def _merged(options: argparse.Namespace) -> Iterator[str]:
    merged = merge(find_source(options.source), options.out, Merge(dtype=options.dtype))
    yield f"{options.out}: {merged.method} merge, {merged.likeness}"


if __name__ == "__main__":
    sys.exit(main())
