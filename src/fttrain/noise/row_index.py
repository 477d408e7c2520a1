"""Which row each token of a micro-batch belongs to, for noise that goes by rows."""

import torch
from torch import Tensor

from ftlaunch.errors import UserError


class Places:
    """The tokens' rows in the micro-batch that is being computed; noise looks them up while the model runs."""

    def __init__(self) -> None:
        self._lengths_BT: Tensor | None = None
        self._rows_BT: Tensor | None = None
        self._position_ids_BT: Tensor | None = None

    def take(self, lengths_BT: Tensor, position_ids_BT: Tensor) -> None:
        """Set the micro-batch: for each token the length of its row (0 on padding) and its position in the row."""
        self._lengths_BT, self._position_ids_BT, self._rows_BT = lengths_BT, position_ids_BT, None

    @property
    def lengths_BT(self) -> Tensor:
        """[B, T]: for each token the length of its row, at least 1."""
        assert self._lengths_BT is not None
        return self._lengths_BT.clamp(min=1)

    @property
    def rows_BT(self) -> Tensor:
        """[B, T]: for each token the number of its row, from 0. A row begins where positions do not go on."""
        if self._rows_BT is None:
            assert self._position_ids_BT is not None
            begins_BT = torch.ones_like(self._position_ids_BT, dtype=torch.bool)
            # Padding goes on counting, so a padded line is one row; a packed row starts again at position 0.
            begins_BT[:, 1:] = self._position_ids_BT.diff(dim=1) != 1
            self._rows_BT = begins_BT.flatten().cumsum(0).sub(1).view_as(begins_BT)
        return self._rows_BT

    def rows_of(self, activation: Tensor) -> Tensor:
        """Return `rows_BT` for an activation [B, T, …] of these tokens. Raises UserError for any other shape."""
        if activation.shape[:2] != self.rows_BT.shape:
            message = f"noise that goes by rows needs activations [rows, tokens, width], not {list(activation.shape)}"
            raise UserError(message, "name other noise.sites, or a kind that goes by elements, such as gaussian")
        return self.rows_BT
