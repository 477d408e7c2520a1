"""The memory of one rank of a stage: what it holds all the time, and its peaks in each part of its course."""

from msgspec import Struct

from ftlaunch.plan import resolve
from ftlaunch.plan.cost import activations, answers, ppo, trained
from ftlaunch.plan.cost.activations import FLOAT, Arithmetic
from ftlaunch.plan.cost.shape import Shape, held_bytes
from ftlaunch.plan.cost.trained import Trained
from ftlaunch.recipe.adapter import Full, LowRank, Virtual
from ftlaunch.recipe.stages import Dpo, Pairwise, Ppo, Reward, Sft, Training
from ftlaunch.run.spec import StageSpec

MOMENTS = 2
READING = "loading"
"""The phase in which the model is read from disk."""
BUCKET = 500_000_000
"""Elements of the buffer in which DeepSpeed gathers gradients, and of a step's weights that ZeRO-3 leaves unsharded."""
IMPORTED = 800 << 20
"""Bytes of a process that has imported torch, transformers and the rest. Half of it is mapped files."""
ROOM_CPU = IMPORTED + (40 << 20)
ROOM_GPU = 900 << 20
"""Bytes that libraries take: what is imported and oneDNN's buffers; or the CUDA context with its kernels."""


class Part(Struct, frozen=True):
    """One thing that takes memory."""

    name: str
    bytes: int


class Memory(Struct, frozen=True, kw_only=True):
    """The memory of one rank."""

    device: str
    """"cuda" or "cpu": where these parts lie."""
    parts: list[Part]
    """What there is, each at its largest. Not all of it at the same time."""
    phases: dict[str, int]
    """Bytes at the peak of each part of a stage's course."""
    host: list[Part] = []
    """What a rank on a GPU takes of the host's memory."""
    mapped: int = 0
    """Bytes of files that are mapped while the model is read: resident, but the kernel takes them back when it must."""
    lingering: int = 0
    """Bytes of these that stay mapped as long as the stage runs."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def needed(self) -> int:
        """The peak without what the kernel can take back."""
        back = {name: self.mapped if name == READING else self.lingering for name in self.phases}
        return max(size - back[name] for name, size in self.phases.items())

    @property
    def host_peak(self) -> int:
        return sum(part.bytes for part in self.host)


def tokens_of(spec: StageSpec) -> tuple[int, int]:
    """Return the tokens of a micro-batch, and the trained ones among them, with rows as long as the data allow."""
    stage = spec.stage
    longest = max((data.max_length for data in spec.data.values()), default=0)
    rows = spec.micro_batch_size * (2 if isinstance(stage, Pairwise) else 1)
    targets = longest - 1
    if isinstance(stage, Ppo):
        longest, targets = longest + stage.max_new_tokens, stage.max_new_tokens
    if isinstance(spec.adapter, Virtual):
        longest += spec.adapter.virtual_tokens
    return rows * longest, rows * targets


def of_stage(spec: StageSpec, shape: Shape, size: int, *, cuda: bool) -> Memory:
    """Memory of one rank of a training stage. `size` is the bytes of an element that is computed with."""
    return _Ledger(spec, shape, size, cuda=cuda).memory()


class _Ledger:
    """The arithmetic of one rank."""

    def __init__(self, spec: StageSpec, shape: Shape, size: int, *, cuda: bool) -> None:
        self.spec, self.shape, self.size, self.cuda = spec, shape, size, cuda
        self.tokens, self.targets = tokens_of(spec)
        self.zero, self.ranks = spec.parallel.zero_stage, spec.world_size
        self.full = isinstance(spec.adapter, Full)
        self.trained: Trained = trained.of(spec.adapter, shape)
        self.held_in_float = self.full and not self.zero
        stream = FLOAT if self.held_in_float else self.size
        kernel = cuda and self.size < FLOAT
        self.arithmetic = Arithmetic(bytes=self.size, stream=stream, has_kernel=kernel)
        self.offloads = spec.parallel.offload == "cpu"
        assert isinstance(spec.stage, Training)
        self.checkpoints = spec.stage.activation_checkpointing
        self.answers = answers.of_training(spec, spec.stage)
        self.answering = self.answers.memory(shape, self.size, adapted=not self.full) if self.answers else (0, 0)

    def memory(self) -> Memory:
        parts = self._standing() | self._passing()
        host = []
        if self.cuda:
            host = [("libraries", 3 << 30), ("image of the checkpoint", self._image())]
            if self.offloads:
                host.append(("optimizer and gradients", 2 * self._masters() + self._moments()))
        else:
            parts["image of the checkpoint"] = self._image()
        return Memory(
            device="cuda" if self.cuda else "cpu",
            parts=[Part(name, size) for name, size in parts.items() if size],
            phases=self._phases(parts),
            host=[Part(name, size) for name, size in host],
            mapped=self._mapped(),
            lingering=self._lingering(),
        )

    def _standing(self) -> dict[str, int]:
        """What is held from the first step to the last."""
        on_device = not (self.offloads and self.cuda)
        return {
            "weights": self._weights(),
            "file of quantized weights": self._lingering(),
            "adapter": self._adapter(),
            "reference": self._reference(),
            **self._judges(),
            "fp32 masters": self._masters() * on_device,
            "optimizer": self._moments() * on_device,
            "libraries": ROOM_GPU if self.cuda else ROOM_CPU,
        }

    def _passing(self) -> dict[str, int]:
        """What comes and goes within a step."""
        return {
            "gradients": self._gradients(),
            "gradient buffer": self._bucket(),
            "gathered weights": self._gathered(),
            "16-bit copies of weights": self._casts(),
            "activations": self._activations(),
            "logits": self._logits(backward=False),
            "keys and values of answers": self.answering[0],
        }

    def _weights(self) -> int:
        """The base as this rank holds it."""
        shape = self.shape
        if self.held_in_float:
            return FLOAT * shape.parameters
        held = held_bytes(shape, str(self.spec.model.quantization), self.size)
        return held // self.ranks if self.zero == 3 else held

    def _adapter(self) -> int:
        if self.full:
            return 0
        size = self.size if self.zero else FLOAT
        own = size * (self.trained.parameters + self.trained.frozen)
        return own // self.ranks if self.zero == 3 else own

    def _reference(self) -> int:
        """A frozen copy of what PPO and DPO are held to: all weights, or the adapter that a stage starts from."""
        stage = self.spec.stage
        if isinstance(stage, Ppo) and self.full:
            return self.size * self.shape.parameters
        live = isinstance(stage, Dpo) and resolve.reference(stage, self.spec.adapter) == "live"
        goes_on = self.spec.start is not None and self.spec.start.endswith("/artifact")
        return self._adapter() if (live or isinstance(stage, Ppo)) and goes_on and not self.full else 0

    def _judges(self) -> dict[str, int]:
        """PPO's value head with its gradient and moments, and the model that gives the scores."""
        stage = self.spec.stage
        if not isinstance(stage, Ppo):
            return {}
        told = ppo.reward_model(self.spec, stage, self.shape, self.size, self._adapter())
        return {"value head": FLOAT * (2 + MOMENTS) * (self.shape.width + 1), "reward model": told}

    def _masters(self) -> int:
        return FLOAT * self.trained.parameters // self.ranks if self.zero else 0

    def _moments(self) -> int:
        size = 1 if "8bit" in self.spec.optimizer.name else FLOAT
        count = self.trained.parameters * MOMENTS * size
        return count // self.ranks if self.zero else count

    def _gradient_size(self) -> int:
        return self.size if self.zero else FLOAT

    def _gradients(self) -> int:
        whole = self._gradient_size() * self.trained.parameters
        return whole // self.ranks if self.zero >= 2 else whole

    def _bucket(self) -> int:
        """DeepSpeed's bucket, through which all gradients pass. It is taken whole on a GPU, and as far as it is used
        on a CPU, where pages exist once they are written. DDP's buckets are the gradients."""
        if not self.zero:
            return 0
        used = BUCKET if self.cuda else min(BUCKET, self.trained.parameters)
        return self._gradient_size() * used

    def _gathered(self) -> int:
        """Weights that ZeRO-3 has brought together: it lets them be until there are a thousand million. On a CPU there
        is also the buffer of the largest."""
        buffer = 0 if self.cuda else self.shape.largest
        return self.size * (min(self.shape.parameters, 2 * BUCKET) + buffer) if self.zero == 3 else 0

    def _casts(self) -> int:
        """Copies of trained fp32 weights, which autocast makes once for a step's forward and backward pass."""
        return self.size * self.trained.parameters if self.size < FLOAT and not self.zero else 0

    def _layer(self) -> int:
        """Bytes per token that one layer keeps for its backward pass."""
        dropout = self.spec.adapter.dropout if isinstance(self.spec.adapter, LowRank) else 0.0
        layer = activations.of_layer(self.shape, self.trained, self.arithmetic, dropout, full=self.full)
        if isinstance(self.spec.stage, Sft):
            longest = max((data.max_length for data in self.spec.data.values()), default=0)
            layer += activations.of_dropout(self.shape, self.arithmetic, longest)
        return layer

    def _activations(self) -> int:
        """Bytes that the layers keep for the backward pass of a micro-batch, and what the head reads."""
        shape, layer = self.shape, self._layer()
        layers = self.trained.layers_backward
        stream = self.arithmetic.stream * shape.width
        kept = stream * layers + layer if self.checkpoints else layer * layers
        ends = shape.width * (FLOAT + self.arithmetic.stream * (2 if self.full else 1))
        return self.tokens * (kept + ends) + self.targets * shape.width * self.size * 2

    def _logits(self, *, backward: bool) -> int:
        if isinstance(self.spec.stage, Reward):
            return 0
        if isinstance(self.spec.stage, Ppo):
            return activations.of_logits_with_entropy(self.shape, self.targets, backward=backward)
        return activations.of_logits(
            self.shape,
            self.targets,
            self.size,
            trained_head=self.trained.head,
            backward=backward,
            copied=not self.cuda and self.ranks == 1,
        )

    def _image(self) -> int:
        """The copy from which checkpoints are written: weights and moments of what this rank trains."""
        return FLOAT * self.trained.parameters * (1 + MOMENTS) // self.ranks

    def _phases(self, parts: dict[str, int]) -> dict[str, int]:
        """Peaks: reading the model, rollouts, the forward and backward pass, the optimizer's step, the artifact."""
        held = sum(self._standing().values()) + (0 if self.cuda else self._image())
        gradients, bucket = parts["gradients"], parts["gradient buffer"]
        # DDP's buckets and ZeRO-3's shards of gradients outlive a step; others live from one micro-batch to the last.
        lasting = gradients + bucket if self.zero == 3 else gradients if self.ranks > 1 and not self.zero else 0
        carried = max(lasting, gradients if self.spec.accumulation > 1 else 0)
        carried += bucket if self.cuda and self.zero < 3 else 0
        # While the backward pass goes down, activations make room for gradients: one of its two ends is the peak.
        # A layer that is computed again is there once the logits are gone.
        again = self.tokens * self._layer() if self.checkpoints else 0
        begins = parts["activations"] - again + max(parts["logits"], self._logits(backward=True), again)
        # One layer's are left when it has come to the lowest.
        lowest = parts["activations"] // max(1, self.trained.layers_backward)
        ends = lowest + gradients + bucket - carried
        whole = self._casts() + parts["gathered weights"]
        around = carried + whole
        return {
            READING: self._reading(parts["weights"]) + parts["libraries"],
            **({self.answers.phase: held + lasting + whole + sum(self.answering)} if self.answers else {}),
            "forward and backward": held + around + max(begins, ends),
            "optimizer": held + max(gradients, lasting) + self._step(),
            "artifact": held + lasting + self._artifact(),
        }

    def _step(self) -> int:
        """What AdamW needs for a moment: two tensors like the largest weight, or like all of them at once on a GPU.

        ZeRO's optimizer has one weight, which is flat. ZeRO-3, and ZeRO in 16 bits, also make a gradient of it in fp32.
        """
        if self.offloads and self.cuda:
            return 0
        if self.zero:
            share = FLOAT * self.trained.parameters // self.ranks
            return share * (3 if self.zero == 3 or self.size < FLOAT else 2)
        return FLOAT * (self.trained.parameters if self.cuda else 2 * self.trained.largest)

    def _reading(self, weights: int) -> int:
        """The weights and the file that they are read from, which are the same pages where nothing is converted."""
        held = FLOAT if self.held_in_float else self.size
        same = held == self.shape.disk_bytes and self.zero != 3 and not self.spec.model.is_quantized
        stacked = self.shape.disk_bytes * self.shape.expert_parameters * self.shape.layers
        return weights + (stacked if same else self._mapped()) if not self.cuda else weights

    def _mapped(self) -> int:
        return 0 if self.cuda else self.shape.parameters * self.shape.disk_bytes

    def _lingering(self) -> int:
        """Pages of weights that were read to be quantized, or of experts that were read to be stacked: embeddings are
        used as they lie in the same mapped file.

        DDP and DeepSpeed write to all weights, which moves them out of the file."""
        shape = self.shape
        stays = self.ranks == 1 and not self.zero and self.size == shape.disk_bytes and not self.cuda
        kept = shape.matrix_parameters if self.spec.model.is_quantized else shape.expert_parameters * shape.layers
        return shape.disk_bytes * kept if stays else 0

    def _artifact(self) -> int:
        """Weights whole in fp32, and one of them in the format that they are written in."""
        if self.cuda:
            return 0
        return self.trained.parameters * FLOAT + (self.trained.largest * self.size if self.full else 0)
