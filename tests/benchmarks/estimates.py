"""The memory that `ftlaunch plan` foresees against the peak that is measured, over combinations on small models.

    PYTHONPATH=. python tests/benchmarks/estimates.py --model .cache/SmolLM2-135M-Instruct [--measured FILE]

A process imports everything, then makes ranks by fork. Each rank first maps all pages of the libraries, so that its
resident set from then on grows by its own work only; the peak above that is what is compared, of the rank that used
most. The C library is told to give back what is freed, which it would keep to save time.
"""

import argparse
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MIB = 1 << 20
NEAR = 0.1
POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ."""


class Combination(NamedTuple):
    """One way to train."""

    stage: str
    method: str
    strategy: str
    micro: int
    length: int
    model: str = "mid"
    more: str = ""
    """More settings of the recipe, as `--set` takes them, with blanks between them."""

    def __str__(self) -> str:
        return " ".join(map(str, self)).strip()


COMBINATIONS = [
    Combination("sft", "lora", "single", 2, 256),
    Combination("sft", "lora", "single", 8, 128),
    Combination("sft", "lora", "single", 1, 1024),
    Combination("sft", "lora", "single", 2, 512, "mid", "stage.0.activation_checkpointing=true"),
    Combination("sft", "lora", "ddp", 2, 256),
    Combination("sft", "lora", "zero1", 2, 256),
    Combination("sft", "lora", "zero2", 2, 256),
    Combination("sft", "lora", "zero3", 2, 256),
    Combination("sft", "full", "single", 2, 256),
    Combination("sft", "full", "single", 1, 1024, "mid", "stage.0.activation_checkpointing=true"),
    # DDP makes its buckets again for the second step: those of the third and later ones are there all the time.
    Combination("sft", "full", "ddp", 2, 256, "mid", "stage.0.steps=4"),
    Combination("sft", "full", "zero1", 2, 256),
    Combination("sft", "full", "zero2", 2, 256),
    Combination("sft", "full", "zero3", 2, 256),
    Combination("sft", "dora", "single", 2, 256),
    Combination("sft", "rslora", "single", 4, 256, "mid", "adapter.rank=64"),
    Combination("sft", "prompt", "single", 2, 256),
    Combination("sft", "prefix", "single", 2, 256),
    Combination("sft", "lora", "single", 2, 256, "gpt2"),
    Combination("sft", "full", "single", 2, 256, "gpt2"),
    Combination("sft", "lora", "single", 2, 256, "qwen2"),
    Combination("sft", "full", "zero2", 2, 256, "qwen2"),
    Combination("sft", "lora", "single", 2, 256, "moe"),
    Combination("dpo", "lora", "single", 2, 256),
    Combination("dpo", "lora", "zero2", 2, 128),
    Combination("dpo", "full", "single", 1, 256),
    Combination("orpo", "lora", "single", 2, 256),
    Combination("reward", "lora", "single", 2, 256),
    Combination("sft", "lora", "single", 2, 256, "smol"),
    Combination("sft", "lora", "single", 4, 256, "smol", "adapter.layers=top:8"),
    Combination("sft", "full", "single", 1, 256, "smol"),
    Combination("dpo", "lora", "single", 1, 256, "smol"),
    Combination("sft", "lora", "single", 2, 256, "mid", "model.quantization=nf4"),
    Combination("sft", "lora", "ddp", 4, 128, "mid", "model.quantization=nf4"),
    Combination("sft", "lora", "single", 2, 256, "mid", "model.quantization=int8"),
    Combination("sft", "dora", "zero3", 2, 256),
    Combination("sft", "dora", "zero2", 1, 512, "mid", "stage.0.activation_checkpointing=true"),
    Combination("sft", "prompt", "zero1", 4, 128),
    Combination("sft", "full", "zero3", 1, 1024, "mid", "stage.0.activation_checkpointing=true"),
    Combination("reward", "full", "zero2", 1, 128),
    Combination("dpo", "dora", "ddp", 1, 256),
    Combination("ppo", "lora", "single", 4, 128),
    Combination("ppo", "full", "single", 2, 128),
    Combination("ppo", "lora", "zero2", 4, 128),
    Combination("ppo", "lora", "single", 2, 512, "mid", "stage.0.generation_batch_size=16"),
    Combination("sft", "lora", "single", 1, 512, "smol", "model.quantization=nf4"),
    Combination("sft", "lora", "zero2", 1, 256, "smol"),
    Combination("sft", "lora", "single", 2, 256, "mid", "model.dtype=bf16"),
    Combination("sft", "full", "zero2", 2, 256, "mid", "model.dtype=bf16"),
    Combination("sft", "full", "single", 2, 512, "mid", "model.dtype=bf16 stage.0.activation_checkpointing=true"),
    Combination("merge", "lora", "single", 2, 128),
    Combination("merge", "dora", "single", 1, 128, "smol"),
]
"""What is measured."""

SIZES: dict[str, Any] = {"vocab_size": 8192, "max_position_embeddings": 2048, "bos_token_id": 0, "eos_token_id": 0}
GATED = SIZES | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
GATED |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
CONFIGS = {
    "mid": GATED | {"model_type": "llama"},
    "qwen2": GATED | {"model_type": "qwen2", "tie_word_embeddings": True},
    "gpt2": SIZES | {"model_type": "gpt2", "n_positions": 1024, "n_embd": 512, "n_layer": 4, "n_head": 8},
    "moe": GATED | {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4},
}
"""Small models of a few families, in fp32 on disk."""

ROLLOUTS = 'reward_function = "reward.py:length"\nmax_new_tokens = 32\nrollout_size = 16\nppo_epochs = 2'
RECIPE = """
name = "estimate"
[model]
path = "{model}"
dtype = "fp32"
[adapter]
kind = "{method}"
{data}
[[stage]]
kind = "{stage}"
data = "rows"
steps = 2
batch_size = {batch}
micro_batch_size = {micro}
save_every = 1
{sharing}
[parallel]
strategy = "{strategy}"
procs_per_node = {processes}
device = "cpu"
"""


def write_run(one: Combination, models: dict[str, Path], folder: Path) -> list[tuple[Path, Any]]:
    """A run folder with a stage whose rows are all as long as may be, and those that it needs before it; returns each
    stage's folder and its spec."""
    from tests.faults.ranks import write_run as write

    from ftlaunch.load import load_recipe

    pairs = one.stage in ("dpo", "orpo", "reward")
    words = "lamp kettle river stone seven green table window " * (one.length // 6)
    if pairs:
        how = 'format = "preference"\ntemplate = "none"'
        rows = [{"prompt": f"{n} go", "chosen": f"{n} {words}", "rejected": f"{words[5 * n :]} {n}"} for n in range(16)]
    elif one.stage == "ppo":
        how = 'prompt = "{q}"\ncompletion = "{a}"\ntemplate = "none"'
        rows = [{"q": f"{n} {words}"[: one.length - 2], "a": "lamp"} for n in range(16)]
        (folder / "reward.py").write_text("def length(prompt, answer, row):\n    return len(answer) / 4\n")
    else:
        how = 'format = "text"\noverlong = "truncate"\ntemplate = "none"'
        rows = [{"text": f"{n} {words}"} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    processes = 1 if one.strategy == "single" else 2
    text = RECIPE.format(
        model=models[one.model],
        method=one.method,
        stage="sft" if one.stage == "merge" else one.stage,
        micro=one.micro,
        batch=one.micro * processes,
        strategy=one.strategy,
        processes=processes,
        sharing="share_prompt = false" if pairs else ROLLOUTS if one.stage == "ppo" else "",
        data=f'[data.rows]\npath = "rows.jsonl"\nmax_length = {one.length}\n{how}\n',
    )
    path = folder / "recipe.toml"
    path.write_text(text + ('[[stage]]\nkind = "merge"\n' if one.stage == "merge" else ""))
    recipe = load_recipe(path, one.more.split()).recipe
    run = write(recipe, folder / "run")
    return [(step.path, step.read_spec()) for step in run.stage_dirs()]


def make_models(folder: Path, smol: Path) -> dict[str, Path]:
    """Random models of a few families over single bytes, in fp32 on disk; and the real one."""
    import torch
    from tests.conftest import _byte_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {"smol": smol}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = folder / name
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(made[name])
        _byte_tokenizer().save_pretrained(made[name])
    return made


def populate_libraries() -> None:
    """Map every page of the files that are mapped already, so that they do not count later, and hold those that are
    only read: under pressure the kernel takes them back, and the peak would seem that much lower."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, mode, _, _, inode, *_ = line.split()
        if inode != "0" and "r" in mode:
            start, end = (int(address, 16) for address in place.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), POPULATE_READ)
            if "w" not in mode and libc.mlock(ctypes.c_void_p(start), ctypes.c_size_t(end - start)):
                print("pages cannot be held: give the process more `ulimit -l`", file=sys.stderr)


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def serve() -> None:
    """The process that makes ranks: reads step folders, answers with the peaks of their ranks in bytes."""
    from tests.faults import rank_forker

    from fttrain.stages import dpo, merge, orpo, ppo, reward, sft  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rank_forker.import_everything()
    _warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        environment = rank_forker.environment(Path(order["step"]), order["world_size"])
        pids = [_fork(order, rank, environment) for rank in range(order["world_size"])]
        codes = [os.waitstatus_to_exitcode(status) for status in rank_forker.wait(pids)]
        peaks = (
            [int(Path(f"{order['step']}/peak-{rank}").read_text()) for rank in range(len(pids))]
            if not any(codes)
            else []
        )
        print(json.dumps(peaks), file=answers, flush=True)


def _warm_up() -> None:
    """Have torch make its threads and buffers, as they are no part of a model."""
    import torch

    x = torch.randn(64, 64, requires_grad=True)
    (x @ x).sum().backward()


def _fork(order: dict[str, Any], rank: int, environment: dict[str, str]) -> int:
    if pid := os.fork():
        return pid
    from tests.faults import rank_forker

    rank_forker.become_rank(order, rank, environment)
    if order["world_size"] == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # `accelerate launch` sets none of them, and with them DDP would wrap the model
    from fttrain.__main__ import main as run_rank

    code = 1
    try:
        populate_libraries()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        peaks = _watch(f"{order['step']}/phases-{rank}") if os.environ.get("PHASES") else []
        code = run_rank()
        peaks.append(resident("VmHWM"))
        Path(f"{order['step']}/peak-{rank}").write_text(str(max(peaks) - before))
    finally:
        os._exit(code)


def _watch(path: str) -> list[int]:
    """Note the peak of each part of a stage, for whoever looks for a difference; returns these as they come."""
    from fttrain.checkpoint.store import Checkpoints
    from fttrain.engine import Engine
    from fttrain.training import session

    notes = Path(path).open("w")  # noqa: SIM115 it is closed with the process
    peaks: list[int] = []

    def note(what: str) -> None:
        told = ", ".join(f"{name} {resident(name) / MIB:.0f}" for name in ("VmRSS", "RssFile", "RssShmem", "VmHWM"))
        notes.write(f"{what}: {told}\n")
        notes.flush()
        peaks.append(resident("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")

    def around(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            note(f"{name} begins")
            answer = whole(*arguments, **named)
            note(f"{name} ends")
            return answer

        setattr(owner, name, noted)

    note("start")
    around(session, "load_base")
    around(session, "build")
    around(Engine, "prepare")
    around(Engine, "forward")
    around(Engine, "backward")
    around(Engine, "step")
    around(Checkpoints, "save")
    around(session.probe, "settle")
    around(session.artifact, "save")
    return peaks


def measure(forker: "subprocess.Popen[str]", step: Path, world_size: int) -> int:
    """Peak in bytes of the rank that used most."""
    from tests.faults.ranks import _free_port

    assert forker.stdin is not None
    assert forker.stdout is not None
    forker.stdin.write(json.dumps({"step": str(step), "world_size": world_size, "port": _free_port()}) + "\n")
    forker.stdin.flush()
    peaks = json.loads(forker.stdout.readline())
    return max(peaks, default=0)


def start_forker(folder: Path, *, phases: bool) -> "subprocess.Popen[str]":
    environment = os.environ | GIVE_BACK | {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | ({"PHASES": "1"} if phases else {}),
        stderr=(folder / "log").open("w"),
    )


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", default="", help="combinations with this text in them")
    parser.add_argument("--measured", type=Path, help="file with peaks: those in it are not measured again")
    parser.add_argument("--phases", action="store_true", help="also show peaks call by call")
    options = parser.parse_args()
    from ftlaunch.plan.cost import costs, memory
    from ftlaunch.plan.cost.devices import Device

    kept: dict[str, int] = {}
    if options.measured and options.measured.exists():
        kept = json.loads(options.measured.read_text())
    folder = Path(tempfile.mkdtemp(prefix="estimates-"))
    models = make_models(folder, options.model.resolve())
    forker = start_forker(folder, phases=options.phases)
    off: list[float] = []
    for number, one in enumerate(one for one in COMBINATIONS if options.only in str(one)):
        place = folder / str(number)
        place.mkdir()
        *earlier, (step, spec) = write_run(one, models, place)
        peak = kept.get(str(one))
        if peak is None:
            for folder_before, spec_before in earlier:
                measure(forker, folder_before, spec_before.world_size)
            peak = measure(forker, step, spec.world_size)
        if not peak:
            print(f"{one!s:72s} FAILED, see {folder}", flush=True)
            continue
        kept[str(one)] = peak
        if options.measured:
            options.measured.write_text(json.dumps(kept, indent=1))
        foreseen = costs.of_spec(
            spec, Device("the CPU", False), costs.SIZES[spec.model.dtype], merged=earlier[-1][1] if earlier else None
        )
        assert isinstance(foreseen, costs.Cost)
        told = foreseen.memory
        peak_foreseen = told.peak - memory.IMPORTED
        off.append(peak_foreseen / peak - 1)
        sizes = f"foreseen {peak_foreseen / MIB:6.0f} measured {peak / MIB:6.0f} MiB"
        print(f"{one!s:72s} {sizes}  {off[-1]:+.1%}", flush=True)
        if options.phases:
            print((step / "phases-0").read_text(), *(f"  {part.name} {part.bytes / MIB:.0f}" for part in told.parts))
            print({name: round(size / MIB) for name, size in told.phases.items()})
    near = sum(abs(each) <= NEAR for each in off)
    median = statistics.median(map(abs, off))
    print(f"{len(off)} combinations: off by {median:.1%} in the median, {near} within {NEAR:.0%}")


if __name__ == "__main__":
    main()
