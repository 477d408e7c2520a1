"""The launcher: it reads recipes, plans runs, starts them and watches their folders. It never imports torch."""

__version__ = "0.1.0"
