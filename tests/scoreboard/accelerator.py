"""accelerate's save_state and load_state, as its documentation shows them."""

from pathlib import Path

import torch
from tests.scoreboard import tiny


class AcceleratorSaver:
    files_a_save = 1
    pickles = ("optimizer.bin", "random_states_0.pkl")

    def train(self, folder: Path, *, stop_at: int | None = None, steps: int = tiny.STEPS) -> str:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        tiny.slow_disk()
        project = ProjectConfiguration(str(folder / "out"), automatic_checkpoint_naming=True)
        accelerator = Accelerator(cpu=True, project_config=project)
        model = tiny.make_model()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        begin = 0
        if found := self.checkpoints(folder):
            accelerator.load_state()
            project.iteration = self._number(found[-1]) + 1
            begin = project.iteration * tiny.SAVE_EVERY
        for step in range(begin, steps):
            ids = tiny.batch(step)
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
            tiny.beat(folder)
            if (step + 1) % tiny.SAVE_EVERY == 0:
                accelerator.save_state()
            if step + 1 == stop_at:
                raise tiny.Stopped
        return tiny.digest(accelerator.unwrap_model(model).state_dict())

    def checkpoints(self, folder: Path) -> list[Path]:
        return sorted((folder / "out/checkpoints").glob("checkpoint_*"), key=self._number)

    def chosen(self, folder: Path) -> Path:
        return self.checkpoints(folder)[-1]

    def weights(self, checkpoint: Path) -> Path:
        return checkpoint / "model.safetensors"

    def optimizer(self, checkpoint: Path) -> Path:
        return checkpoint / "optimizer.bin"

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.name.partition("_")[2])
