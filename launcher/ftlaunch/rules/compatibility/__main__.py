"""`python -m ftlaunch.rules.compatibility`: the page of what goes with what, for recipes/COMPATIBILITY.md."""

from ftlaunch.rules.compatibility.table import page

if __name__ == "__main__":
    print(page(), end="")
