"""What a model can read: rows that are more are told before the first step, not by the step that meets them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ftlaunch.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What one model can take."""

    vocabulary: int
    """Token ids are below this."""
    positions: int | None
    """Most tokens of a row; None where positions are computed and not looked up in a table."""

    def require_short(self, where: str, tokens: int, *, virtual: int = 0) -> None:
        """Raise UserError where a row of so many tokens, after `virtual` ones, has more than the model has positions.

        `where` names the rows.
        """
        if self.positions is None or tokens + virtual <= self.positions:
            return
        after = f", after {virtual} virtual ones" if virtual else ""
        raise UserError(
            f"{where}: a row has {tokens} tokens{after}, and the model has a table of {self.positions} positions",
            f"set max_length = {max(1, self.positions - virtual)} in the data table, or use a base with more positions",
        )

    def require_known(self, where: str, ids: np.ndarray, tokenizer: Any) -> None:
        """Raise UserError where a token is none of the model's."""
        if (largest := int(ids.max(initial=0))) >= self.vocabulary:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"{where}: a row has token {largest} ({token!r}), and the model knows tokens below {self.vocabulary}",
                "use the tokenizer that the model was trained with, leave the token out of rows and template, or give"
                " the model's embedding more rows (transformers: resize_token_embeddings)",
            )
