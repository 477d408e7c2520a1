"""`python -m ftlaunch.compatibility`: the page of what goes with what, for recipes/COMPATIBILITY.md."""

from ftlaunch.compatibility.table import page

if __name__ == "__main__":
    print(page(), end="")
