"""transformers' Trainer, by which TRL's trainers save as well."""

import os
from pathlib import Path

from tests.scoreboard import tiny


class TrainerSaver:
    files_a_save = 1
    pickles = ("optimizer.pt",)

    def train(self, folder: Path, *, stop_at: int | None = None, steps: int = tiny.STEPS) -> str:
        from transformers import Trainer, TrainerCallback, TrainingArguments
        from transformers.trainer_utils import get_last_checkpoint

        class Watch(TrainerCallback):
            def on_step_end(self, *_, **__):
                tiny.beat(folder)

            def on_save(self, _arguments, state, _control, **_):
                if state.global_step == stop_at:
                    raise tiny.Stopped

        out = folder / "out"
        tiny.slow_disk()
        arguments = TrainingArguments(
            str(out),
            max_steps=steps,
            save_steps=tiny.SAVE_EVERY,
            per_device_train_batch_size=tiny.BATCH,
            learning_rate=1e-2,
            use_cpu=True,
            ddp_backend="gloo" if "RANK" in os.environ else None,
            report_to=[],
            hub_token=os.environ.get("CANARY"),
        )
        model = tiny.make_model()
        ids = [{"input_ids": row, "labels": row} for row in tiny.rows(steps)]
        trainer = Trainer(model, arguments, train_dataset=ids, callbacks=[Watch()])
        trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.exists() else None)
        return tiny.digest(model.state_dict())

    def checkpoints(self, folder: Path) -> list[Path]:
        return sorted((folder / "out").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))

    def chosen(self, folder: Path) -> Path:
        """What a resume would take."""
        from transformers.trainer_utils import get_last_checkpoint

        return Path(str(get_last_checkpoint(str(folder / "out"))))

    def weights(self, checkpoint: Path) -> Path:
        return checkpoint / "model.safetensors"

    def optimizer(self, checkpoint: Path) -> Path:
        return checkpoint / "optimizer.pt"
