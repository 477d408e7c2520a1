"""`ftlaunch merge`: the adapter of a run, or of a folder, folded into its base."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from ftlaunch.recipe.stages import Merge
from ftlaunch.tools import MergeOptions
from fttrain.merging.merge import find_source, merge
from fttrain.tools.output import run


def main(options: MergeOptions) -> Iterator[str]:
    """Write the merged model and say how like it is."""
    spec = Merge(dtype=options.dtype, max_kl=options.max_kl)
    words = ["ftlaunch", "merge", options.source, options.out]
    words += ["--dtype", options.dtype] if options.dtype else []
    merged = merge(
        find_source(Path(options.source)), Path(options.out), spec, lambda kl: shlex.join([*words, "--max-kl", kl])
    )
    yield f"{options.out}: {merged.method} merge, {merged}"


if __name__ == "__main__":
    run(main, MergeOptions)
