"""The recipes that come with ftlaunch."""

from pathlib import Path

from ftlaunch.errors import UserError
from ftlaunch.load.messages import as_toml, did_you_mean

PACKAGE = Path(__file__).parents[1]


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every shipped recipe, by name. What stands in base/ is for recipes to extend, not to run."""
    # A wheel has the recipes inside the package, a checkout at its top.
    installed = PACKAGE / "recipes"
    folder = installed if installed.is_dir() else PACKAGE.parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_recipe(name_or_path: str) -> Path:
    """The file at the path, else the shipped recipe of that name. Raises UserError where there is neither."""
    path = Path(name_or_path).expanduser()
    try:
        if path.is_file():
            return path
    # Such as a name of more than 255 bytes.
    except OSError as error:
        raise UserError(f"{name_or_path} is no path that can be had: {error.strerror}", "correct the path") from error
    shipped = shipped_recipes()
    name = name_or_path.removesuffix(".toml")
    if name in shipped:
        return shipped[name]
    otherwise = "correct the path, or see the shipped recipes with `ftlaunch recipes`"
    guess = did_you_mean(Path(name).name, shipped, "")
    remedy = f"{guess} `ftlaunch recipes` shows all" if guess else otherwise
    raise UserError(f"there is no recipe {as_toml(name_or_path)}, neither a file nor a shipped one", remedy)


def description(path: Path) -> str:
    """The first comment of a recipe, which says in a line what it does; empty where it has none."""
    with path.open(encoding="utf-8") as file:
        lines = (line.strip() for line in file)
        return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
