"""The two pictures of a search: the largest input and output of each layer's down projection."""

from pathlib import Path

from matplotlib.figure import Figure

from fttrain.superweights.find import Found, Spike


def draw(found: Found, folder: Path) -> None:
    """Write inputs.png and outputs.png to `folder`, with the super weights marked."""
    _draw(found, "input", "column", folder / "inputs.png")
    _draw(found, "output", "row", folder / "outputs.png")


def _draw(found: Found, side: str, channel: str, path: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([one.layer for one in found.spikes], [_size(one, side) for one in found.spikes], marker=".")
    # A spike is orders of magnitude above the other layers' values, which would be a flat line.
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"largest |{side}| of the down projection")
    of_layer = {one.layer: one for one in found.spikes}
    for spike in found.weights:
        at = (spike.layer, _size(of_layer[spike.layer], side))
        axes.plot(*at, "o", color="tab:red")
        axes.annotate(f"{channel} {getattr(spike, channel)}", at, textcoords="offset points", xytext=(6, 4))
    figure.savefig(path, dpi=120)


def _size(spike: Spike, side: str) -> float:
    # A logarithmic axis has no 0.
    return max(abs(getattr(spike, side)), 1e-6)
