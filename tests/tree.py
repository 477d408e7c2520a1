"""The tree of src/ARCHITECTURE.md, made from the first sentences of the files: `python -m tests.tree --write`."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "src" / "ARCHITECTURE.md"
PACKAGES = ("launcher/ftlaunch", "src/fttrain")
BEGIN, END = "<!-- tree: made by `python -m tests.tree --write` -->\n", "<!-- end of the tree -->\n"


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    words = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:!?])(?<!e\.g\.) (?=[A-Z`])", words)[0]


def lines(folder: Path, depth: int = 0) -> list[str]:
    """A line for the folder and for each file and folder in it, as a nested Markdown list."""
    indent = "  " * depth
    name = folder.relative_to(ROOT) if depth == 0 else folder.name
    found = [f"{indent}- **{name}/** {sentence(folder / '__init__.py')}"]
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            found.append(f"{indent}  - `{path.name}` {sentence(path)}")
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            found += lines(path, depth + 1)
    return found


def page() -> str:
    """The page as it should be: its own text, with the tree made again."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    tree = "\n".join(line for package in PACKAGES for line in lines(ROOT / package))
    return f"{before}{BEGIN}\n{tree}\n\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page())
    sys.exit(PAGE.read_text() != page())
