"""What a forward pass keeps for the backward one, counted tensor by tensor as autograd holds them."""

from msgspec import Struct

from ftlaunch.plan.cost.shape import Shape
from ftlaunch.plan.cost.trained import Trained

CHUNK = 1024
"""Tokens whose logits exist at once (`fttrain.objectives.logps`)."""
ROWS = 128
"""Rows of a chunk that exist in fp32 too where the head is frozen."""
FLOAT = 4


class Arithmetic(Struct, frozen=True, kw_only=True):
    """The formats that a stage computes in."""

    bytes: int
    """Bytes of an element that matrices are multiplied in."""
    stream: int
    """Bytes of an element between layers: more where the weights are fp32 and only products are cast."""
    has_kernel: bool
    """Whether attention is one kernel over rows of any length, as on a GPU in 16 bits. Else rows are copied for it."""


def of_layer(shape: Shape, trained: Trained, arithmetic: Arithmetic, dropout: float, *, full: bool) -> int:
    """Bytes per token that one decoder layer keeps for its backward pass."""
    size = arithmetic.bytes
    adapted = {linear.name for linear in trained.adapted}
    keeps = {linear.name: full or linear.name in adapted for linear in shape.linears}
    kept = _norms(shape, arithmetic, keeps, full=full)
    kept += size * (2 * shape.queries + 2 * shape.keys)  # queries, keys and values, and what attention makes of them
    last = next(linear for linear in shape.linears if linear.outputs == shape.width)
    if keeps[last.name] and not arithmetic.has_kernel:
        kept += size * shape.queries  # put back into the order of the tokens
    kept += size * (_experts(shape, full=full) if shape.expert_parameters else _mlp(shape, keeps))
    kept += size * trained.rank * len(trained.adapted)
    if trained.turned:
        # DoRA's backward pass reads each result. These are kept for others anyway.
        shared = ("v_proj", "gate_proj", "up_proj")
        kept += size * sum(linear.outputs for linear in trained.adapted if not linear.name.endswith(shared))
    if dropout:
        kept += (size + 1) * sum(linear.inputs for linear in trained.adapted)
    return kept


def of_dropout(shape: Shape, arithmetic: Arithmetic, row: int) -> int:
    """Bytes per token that one layer keeps because of the model's own dropout, in rows of so many tokens.

    Without a kernel for it, attention keeps its probabilities, what they are multiplied with, and the product.
    """
    attention = 3 * shape.heads * row if shape.attention_dropout and not arithmetic.has_kernel else 0
    return arithmetic.bytes * (attention + (2 * shape.width if shape.hidden_dropout else 0))


def _norms(shape: Shape, arithmetic: Arithmetic, keeps: dict[str, bool], *, full: bool) -> int:
    """Two norms: their inputs in fp32, what is scaled by their weights where these are trained, and their outputs."""
    inputs = FLOAT * shape.width
    normed = arithmetic.stream * shape.width if full and shape.is_gated else 0
    kept = 2 * (inputs + normed)
    is_cast = arithmetic.stream != arithmetic.bytes
    for linears in (shape.linears[:-2], shape.linears[-2:]):
        readers = sum(keeps[linear.name] for linear in linears if linear.inputs == shape.width)
        kept += arithmetic.bytes * shape.width * (readers if is_cast else min(readers, 1))
    return kept


def _mlp(shape: Shape, keeps: dict[str, bool]) -> int:
    """Elements a token: what comes in and out of the activation function, what it is multiplied with, and the product.

    GPT-2's function is written out: its input, half of it, the tanh and one more than that.
    """
    product = keeps[shape.linears[-1].name]
    return (3 if shape.is_gated else 4) * shape.mlp + shape.mlp * product


def _experts(shape: Shape, *, full: bool) -> int:
    """Elements a token of the experts that it is sent to."""
    of_one = shape.width + 3 * shape.mlp + shape.width + (shape.mlp if full else 0)
    return shape.experts_per_token * of_one


def of_logits(shape: Shape, tokens: int, size: int, *, trained_head: bool, backward: bool, copied: bool) -> int:
    """Bytes of the logits of one chunk of trained tokens, with what is made of them at the same time.

    `copied`: whether the matrix product makes a copy of their gradient, as it does with a whole CPU to itself.
    """
    chunk = min(tokens, CHUNK)
    if not trained_head:
        rows = min(chunk, ROWS)
        return shape.vocabulary * ((1 + copied) * size * chunk + FLOAT * rows * (1 if size == FLOAT else 2))
    # Forward, log-sum-exp has the exponentials next to the logits. Backward there are logits, the gradient of the
    # target's logit, and within one expression a difference, its exponential and the product of the latter.
    return shape.vocabulary * chunk * FLOAT * (5 if backward else 2)


def of_logits_with_entropy(shape: Shape, tokens: int, *, backward: bool) -> int:
    """The same where the entropy of each token is trained, too: logits, their softmax and the product of the two; and
    backward also the gradients of these three."""
    return shape.vocabulary * FLOAT * min(tokens, CHUNK) * (6 if backward else 3)
