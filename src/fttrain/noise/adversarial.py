"""Adversarial noise: activations moved along the gradient of the loss, which is computed for it (FGM, FGSM, PGD)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftlaunch.recipe.noise import Adversarial
from fttrain.noise.hooks import ScheduledNoise, first, with_first
from fttrain.noise.kinds import root_mean_square
from fttrain.noise.row_index import Places

TINY = 1e-20
"""Below it a gradient has no direction."""


class AdversarialNoise(ScheduledNoise):
    """Adds to the loss the loss under the worst small change of the sites' activations, to first order."""

    def __init__(self, noise: Adversarial, modules: list[nn.Module], places: Places) -> None:
        super().__init__(noise.schedule)
        self._noise = noise
        self._places = places
        self._deltas: dict[int, Tensor] = {}
        self._taken: dict[int, Tensor] = {}
        for number, module in enumerate(modules):
            module.register_forward_hook(self._hook(number))

    def loss(self, ask: Callable[[], Tensor]) -> Tensor:
        """Return L(a) + weight·L(a + δ). The clean pass is kept, so one gradient step costs one more pass."""
        noise = self._noise
        clean = current = self._asked(ask, {})
        activations = self._taken
        deltas: dict[int, Tensor] = {}
        for _ in range(noise.steps):
            # The clean graph is needed once more, by the backward pass of the sum; those of the steps are not.
            gradients = torch.autograd.grad(current, list(self._taken.values()), retain_graph=current is clean)
            for (number, activation), gradient in zip(activations.items(), gradients, strict=True):
                deltas[number] = self._moved(deltas.get(number), gradient, activation.detach())
            current = self._asked(ask, deltas)
        return clean + noise.weight * current

    def _asked(self, ask: Callable[[], Tensor], deltas: dict[int, Tensor]) -> Tensor:
        """Return the loss with activations moved by `deltas`; afterwards `_taken` has the activations by module."""
        self._deltas, self._taken = deltas, {}
        try:
            return ask()
        finally:
            self._deltas = {}

    def _hook(self, number: int) -> Callable[[nn.Module, Any, Any], Any]:
        def act(module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not module.training:
                return output
            activation = first(output)
            if not activation.requires_grad:  # everything that is trained comes later in the model
                activation = activation.detach().requires_grad_()
            if number in self._deltas:
                activation = activation + self._deltas[number]
            self._taken[number] = activation
            return with_first(output, activation)

        return act

    def _moved(self, delta: Tensor | None, gradient: Tensor, activation: Tensor) -> Tensor:
        """Return δ after a step along the gradient, projected back to its size where it has become larger.

        All are of the activation's shape, [..., D].
        """
        noise = self._noise
        size = self.strength * noise.epsilon * (self._size(activation) if noise.relative else 1.0)
        # 2.5 / steps is Madry's choice (arXiv 1706.06083): steps reach the ball's edge from anywhere within.
        step = noise.step_size or (1.0 if noise.steps == 1 else 2.5 / noise.steps)
        direction = gradient.sign() if noise.norm == "linf" else gradient / self._norm(gradient).clamp(min=TINY)
        moved = step * size * direction if delta is None else delta + step * size * direction
        if noise.norm == "linf":
            limit = torch.as_tensor(size, device=moved.device, dtype=moved.dtype).expand_as(moved)
            return moved.clamp(-limit, limit)
        return moved * (size / self._norm(moved).clamp(min=TINY)).clamp(max=1.0).to(moved.dtype)

    def _size(self, activation: Tensor) -> Tensor:
        return root_mean_square(activation) if self._noise.norm == "linf" else self._norm(activation)

    def _norm(self, values: Tensor) -> Tensor:
        """Return the Euclidean norm of each token, [..., 1], or of the whole row that the token belongs to."""
        squares = values.float().square().sum(-1, keepdim=True)
        if self._noise.per == "row":
            rows = self._places.rows_of(values).flatten()
            sums = squares.new_zeros(int(rows.max()) + 1).index_add(0, rows, squares.flatten())
            squares = sums[rows].view_as(squares)
        return squares.sqrt()
