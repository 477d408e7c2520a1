"""`ftlaunch merge`, as `python -m fttrain.tools.merge RUN|ARTIFACT|ADAPTER OUT`."""

import argparse
import shlex
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
    parser.add_argument("--max-kl", type=float)
    options = parser.parse_args()
    return answer(_merged(options))


def _merged(options: argparse.Namespace) -> Iterator[str]:
    spec = Merge(dtype=options.dtype, max_kl=options.max_kl)
    words = ["ftlaunch", "merge", str(options.source), str(options.out)]
    words += ["--dtype", options.dtype] if options.dtype else []
    merged = merge(find_source(options.source), options.out, spec, lambda kl: shlex.join([*words, "--max-kl", kl]))
    yield f"{options.out}: {merged.method} merge, {merged}"


if __name__ == "__main__":
    sys.exit(main())
