"""DeepSpeed's own checkpoints, ZeRO-2 on the CPU."""

import os
from pathlib import Path

import torch
from tests.scoreboard import tiny

CONFIG = {
    "train_micro_batch_size_per_gpu": tiny.BATCH,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "steps_per_print": 2**31 - 1,
}


class DeepSpeedSaver:
    files_a_save = 1
    pickles = ()

    def train(self, folder: Path, *, stop_at: int | None = None, steps: int = tiny.STEPS) -> str:
        import deepspeed
        import deepspeed.ops

        tiny.slow_disk()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
        if "RANK" not in os.environ:
            os.environ.update(tiny.ranks(1)[0])
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        model = tiny.make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        out = folder / "out"
        if out.exists():
            engine.load_checkpoint(str(out))
        for step in range(engine.global_steps, steps):
            ids = tiny.batch(step)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            tiny.beat(folder)
            if (step + 1) % tiny.SAVE_EVERY == 0:
                engine.save_checkpoint(str(out))
            if step + 1 == stop_at:
                raise tiny.Stopped
        return tiny.digest(engine.module.state_dict())

    def checkpoints(self, folder: Path) -> list[Path]:
        found = (folder / "out").glob("global_step*")
        return sorted(found, key=lambda path: int(path.name.removeprefix("global_step")))

    def chosen(self, folder: Path) -> Path:
        return folder / "out" / (folder / "out/latest").read_text()

    def weights(self, checkpoint: Path) -> Path:
        return checkpoint / "mp_rank_00_model_states.pt"

    def optimizer(self, checkpoint: Path) -> Path:
        return next(checkpoint.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
