"""A few verbs for accelerate and DeepSpeed: prepare, backward, step, evaluate, and the weights as full tensors."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn

from ftlaunch.recipe.stages import Training
from ftlaunch.run.spec import StageSpec
from fttrain.data.batches import Layout, MicroBatch
from fttrain.distributed.world import World
from fttrain.model.scorer import Scorer
from fttrain.objectives.logps import Scores


@runtime_checkable
class RankAllocator(Protocol):
    """What decides which of the trained weights stay."""

    @property
    def watched(self) -> list[str]:
        """Names of the weights whose gradients it wants."""
        ...

    def update(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return new values of weights after a step, from the watched weights and the gradients that made them."""
        ...

    def measures(self) -> dict[str, float]:
        """Return numbers for the log; they are the same on every rank."""
        ...


class Engine:
    """One model and its optimizer under the strategy of the plan.

    Losses given to `backward` are this rank's share of the step's loss: the engine sums gradients over micro-batches
    and ranks, where accelerate and DeepSpeed would average them.
    """

    def __init__(self, spec: StageSpec, world: World) -> None:
        """Must exist before the model is loaded: under ZeRO-3 it makes `from_pretrained` load shards."""
        self.world = world
        self.allocator: RankAllocator | None = None
        """Told of every optimizer step, it says what some weights must be set to. It may be set after `prepare`."""
        self.layout = Layout(packing=False)
        """How rows are laid down for this model, once that has been tried."""
        self.verdict: dict[str, Any] = {}
        """What trying the model has shown."""
        self.zero_stage = spec.parallel.zero_stage
        self._max_grad_norm = spec.stage.max_grad_norm if isinstance(spec.stage, Training) else 0.0
        # Losses come divided; a variable of the shell, which beats a mere argument, would divide them again.
        alone = GradientAccumulationPlugin(num_steps=1)
        # Gradients are views of DDP's buckets, which saves a copy of all of them; no buffer here differs between ranks.
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        assert spec.model.dtype != "auto", "distributed.precision settles it"
        # Under ZeRO it fills in what deepspeed.json calls "auto"; left out, a variable of the shell would.
        precision = "no" if spec.model.dtype == "fp32" else spec.model.dtype
        self._accelerator = Accelerator(
            mixed_precision=precision, gradient_accumulation_plugin=alone, kwargs_handlers=[ddp]
        )
        self._check(spec)

    def _check(self, spec: StageSpec) -> None:
        """accelerate falls back in silence where it cannot do what it was asked for; here that is an error."""
        kind = self._accelerator.distributed_type
        assert (kind == DistributedType.DEEPSPEED) == bool(self.zero_stage), f"asked for {spec.parallel}, got {kind}"
        assert self._accelerator.num_processes == self.world.size
        assert self._accelerator.process_index == self.world.rank

    def prepare(self, scorer: Scorer, optimizer: torch.optim.Optimizer) -> None:
        """Wrap the model and the optimizer for the strategy."""
        self.scorer = scorer
        self._wrapped, self._optimizer = self._accelerator.prepare(scorer, optimizer)
        self.optimizer = optimizer

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer."""
        assert self.zero_stage
        return self._wrapped.optimizer

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all trained weights, in the same order on every rank.

        Weights of the model have the names that it gives them; those of a separate head have the head's names.
        """
        named = self.scorer.named_parameters()
        return ((name.removeprefix("model."), p) for name, p in named if p.requires_grad)

    @property
    def num_trained(self) -> int:
        """Elements of all trained weights together, wherever they are held."""
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for _, parameter in self.trained_parameters())

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of every group of weights, times the group's own factor."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["times"]

    def forward(self, inputs: Any) -> Any:
        """Run the wrapped module on these inputs, in its current mode."""
        return self._wrapped(inputs)

    def scores(self, micro: MicroBatch) -> Scores:
        """Forward pass of a plain Scorer."""
        return self.forward(micro)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; with `last`, also reduce them over ranks and let the optimizer step."""
        # DDP and ZeRO average gradients over ranks, and losses here are shares of a sum: the factor undoes the
        # division.
        loss = loss * self.world.size
        if self.zero_stage:
            # DeepSpeed would count micro-batches itself, but steps have as many as their rows need: it is told the last
            # one.
            self._wrapped.set_gradient_accumulation_boundary(is_boundary=last)
            self._wrapped.backward(loss, scale_wrt_gas=False)
        else:
            self._accelerator.backward(loss)

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward of a micro-batch: only the last one communicates under DDP."""
        if last or self.zero_stage:
            return contextlib.nullcontext()
        return self._accelerator.no_sync(self._wrapped)

    def step(self, *, discard: bool = False) -> float:
        """Clip, update the weights and clear the gradients; returns the global gradient norm before clipping.

        Where the norm is not finite, or with `discard`, weights and moments stay as they are; the norm is then nan.
        """
        # Before the optimizer steps: it clears the gradients, and under ZeRO their buffers are used again.
        gradients = {} if self.allocator is None else self._full_gradients(self.allocator.watched)
        norm = self._step(discard=discard)
        if self.allocator is not None and math.isfinite(norm):
            self._set_full(self.allocator.update(self._full_weights(gradients), gradients))
        return norm

    def measures(self) -> dict[str, float]:
        """Return numbers about the trained weights for the log."""
        return {} if self.allocator is None else self.allocator.measures()

    def _step(self, *, discard: bool) -> float:
        if self.zero_stage:
            # DeepSpeed clips, finds overflow over all ranks and skips the step by itself; it leaves the verdict in
            # `overflow`.
            self._wrapped.step()
            assert self.zero.overflow or not discard, "gradients of a loss that is not finite would have been applied"
            return math.nan if self.zero.overflow else float(self._wrapped.get_global_grad_norm())
        # Without a limit the call still returns the norm, by which steps that are not finite are found.
        limit = self._max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_([p for _, p in self.trained_parameters()], limit)
        assert norm is not None
        finite = math.isfinite(norm) and not discard
        if finite or self.scales_loss:  # the scaler steps over what is not finite, and learns from it
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm) if finite else math.nan

    def _full_gradients(self, names: list[str]) -> dict[str, Tensor]:
        """Return the gradients of these weights, whole and in fp32, on every rank; before clipping. Collective."""
        found: dict[str, Tensor] = {}
        trained = dict(self.trained_parameters())
        for name in names:
            if self.zero_stage:
                from deepspeed.utils import safe_get_full_grad

                gradient = safe_get_full_grad(trained[name])
            else:
                gradient = trained[name].grad
            assert gradient is not None
            found[name] = gradient.detach().float().clone().view(_shape(trained[name]))
        return found

    def _full_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These weights, whole and in fp32, on every rank. Collective."""
        trained = dict(self.trained_parameters())
        return {name: _full_weight(trained[name], sharded=bool(self.zero_stage)).float() for name in names}

    @torch.no_grad()
    def _set_full(self, weights: dict[str, Tensor]) -> None:
        """Set weights to what every rank has for them. Collective."""
        trained = dict(self.trained_parameters())
        for name, value in weights.items():
            if self.zero_stage == 3:
                self._set_share(trained[name], value)
            elif self.zero_stage:
                from deepspeed.utils import safe_set_full_fp32_param

                safe_set_full_fp32_param(trained[name], value)
            else:
                trained[name].copy_(value)
        if weights and self.zero_stage:
            self.follow_masters()

    def _set_share(self, parameter: Any, value: Tensor) -> None:
        """Set this rank's share of a weight under ZeRO-3. DeepSpeed's own way forgets that the last one is padded."""
        from deepspeed.utils import safe_set_local_fp32_param

        size = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        safe_set_local_fp32_param(parameter, padded[size * self.world.rank :][:size])

    def follow_masters(self) -> None:
        """Under ZeRO, make the weights that compute what their fp32 masters are. Collective."""
        if self.zero_stage == 3:
            for group in range(len(self.zero.fp32_partitioned_groups_flat)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self.zero.update_lp_params()

    @property
    def scales_loss(self) -> bool:
        """fp16 with a scale that is found by trial: now and then a step whose gradients overflow is left out."""
        return bool(self.zero.dynamic_loss_scale) if self.zero_stage else self._accelerator.scaler is not None

    def loss_scale(self) -> dict[str, float]:
        """The scale that fp16 multiplies losses with and the steps since it last changed; empty in other formats."""
        if not self.scales_loss:
            return {}
        if self.zero_stage:
            scaler = self.zero.loss_scaler
            steps = scaler.cur_iter - scaler.last_overflow_iter
            # Overflows that DeepSpeed still lets pass before it lowers the scale.
            return {"scale": scaler.cur_scale, "steps": steps, "hysteresis": scaler.cur_hysteresis}
        state = self._accelerator.scaler.state_dict()  # type: ignore[union-attr]
        return {"scale": state["scale"], "steps": state["_growth_tracker"]}

    def set_loss_scale(self, state: dict[str, float]) -> None:
        """Go on with a loss scale that `loss_scale` returned, under whichever strategy."""
        if not state or not self.scales_loss:
            return
        if self.zero_stage:
            scaler = self.zero.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = state["scale"], state["steps"], 0
            scaler.cur_hysteresis = state.get("hysteresis", scaler.delayed_shift)  # earlier versions did not keep it
        else:
            scaler = self._accelerator.scaler
            assert scaler is not None
            changed = {"scale": state["scale"], "_growth_tracker": state["steps"]}
            scaler.load_state_dict(scaler.state_dict() | changed)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode: no dropout, no noise, no gradients."""
        was_training = self._wrapped.training
        # The mode is restored and not set to train(): a block within another one must not end the outer one.
        self._wrapped.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._wrapped.train(was_training)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the wrapped module computes, for calls of parts of it."""
        return self._accelerator.autocast()

    def full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Trained weights whole and in fp32, one after another: on the CPU of rank 0, empty elsewhere. Collective."""
        for name, parameter in self.trained_parameters():
            yield name, self._full(parameter) if self.world.is_main or self.zero_stage else torch.empty(0)

    def _full(self, parameter: nn.Parameter) -> Tensor:
        value = _full_weight(parameter, sharded=bool(self.zero_stage))
        return value.float().cpu().clone() if self.world.is_main else torch.empty(0)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole tensor, also where ZeRO-3 has left a shard of it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _full_weight(parameter: nn.Parameter, *, sharded: bool) -> Tensor:
    """The weight as the optimizer has it, whole. Collective where it is sharded."""
    if not sharded:
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter)
    assert value is not None
    return value.view(_shape(parameter))
