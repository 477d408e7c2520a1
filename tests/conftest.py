"""What several test folders share: a tiny model with a real tokenizer, rows to train on, and the real command line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from tests.faults.ranks import Ranks

    from ftlaunch.run.layout import RunDir

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Launch = Callable[..., subprocess.CompletedProcess[str]]
RunStages = Callable[..., "RunDir"]


def pytest_configure() -> None:
    """Hear the terminal's signals, and let children hear them: a script's `&` has what it starts ignore them."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def save_tiny_model(folder: Path) -> Path:
    """A two-layer Llama of width 64 in fp32 over single bytes, with a ChatML tokenizer; random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    wrapped.chat_template = CHATML
    return wrapped


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def write_rows(path: Path) -> Path:
    """48 rows of question and answer, of very different lengths."""
    draw = random.Random(0)
    words = ["red", "green", "blue", "salt", "pepper", "kettle", "lamp"]
    rows = [
        {"question": " ".join(draw.choices(words, k=draw.randint(1, 6))), "answer": " ".join(draw.choices(words, k=n))}
        for n in (draw.randint(1, 9) for _ in range(48))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The command line as a user has it, with a token cache of its own: `launch("run", recipe, "--set", …)`."""
    cache = tmp_path_factory.mktemp("cache")

    def call(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "ftlaunch", *map(str, arguments)],
            env=os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return call


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Ranks"]:
    """Ranks of a stage that start by fork in a moment, as their imports are done."""
    from tests.faults.ranks import Ranks

    started = Ranks(tmp_path_factory.mktemp("cache"), OMP_NUM_THREADS="1")
    yield started
    started.close()


@pytest.fixture(scope="session")
def run_stages(ranks: "Ranks") -> RunStages:
    """Run all stages of a recipe with such ranks: `run_stages(recipe_file, run_folder, "key=value", …)`."""
    from tests.faults.ranks import write_run

    from ftlaunch.load import load_recipe

    def run(path: Path, folder: Path, *settings: str) -> "RunDir":
        written = write_run(load_recipe(path, list(settings)).recipe, folder)
        for stage_dir in written.stage_dirs():
            ranks.run(stage_dir)
        return written

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """Debian's Chromium without a screen; skipped where there is none, unless FTLAUNCH_TEST_BROWSER=must."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        reason = "chromium is not installed (Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("FTLAUNCH_TEST_BROWSER") == "must" else pytest.skip)(reason)
    with sync_playwright() as started:
        made = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


FIRST = ("slurm", "end_to_end", "faults", "trainer")
"""Folders in the order in which their tests run: those that wait for others long, then those of long tests."""
SLOW_FOLDERS = {"end_to_end", "faults", "scoreboard", "slurm", "zoo"}
SLOW_FIXTURES = {"launch", "ranks", "run_stages"}
"""Fixtures that start processes which import torch."""
SLOW_FILES = {
    "launcher/backend/test_metadata.py",
    "trainer/adapters/test_adalora.py",
    "trainer/adapters/test_adapters.py",
    "trainer/adapters/test_virtual_tokens.py",
    "trainer/checkpoint/test_checkpoint.py",
    "trainer/data/test_feed.py",
    "trainer/data/test_making_rows.py",
    "trainer/data/test_preview.py",
    "trainer/evaluation/test_evaluate.py",
    "trainer/merging/test_families.py",
    "trainer/merging/test_merge.py",
    "trainer/noise/test_stages.py",
    "trainer/objectives/test_trl.py",
    "trainer/ppo/test_scripted_trainer.py",
    "trainer/ppo/test_ppo.py",
    "trainer/ppo/test_rewards.py",
    "trainer/ppo/test_trl_ppo.py",
    "trainer/ppo/test_vllm_rollout.py",
    "trainer/preference/test_dpo.py",
    "trainer/quant/test_qat.py",
    "trainer/quant/test_quantize.py",
    "trainer/quant/test_quantized.py",
    "trainer/serving/test_openai_client.py",
    "trainer/serving/test_page.py",
    "trainer/serving/test_serving.py",
    "trainer/stages/test_evaluation_stage.py",
    "trainer/stages/test_reward.py",
    "trainer/stages/test_seed_recipes.py",
    "trainer/stages/test_sft.py",
    "trainer/superweights/test_superweights.py",
    "trainer/test_canaries.py",
    "trainer/test_compatibility.py",
    "trainer/tools/test_tools.py",
    "trainer/training/test_nonfinite.py",
    "trainer/training/test_probe.py",
}
"""Files whose tests train whole stages or start servers: the first test of each is the sample that is not slow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what they need, and put the folders of long tests first."""
    here = Path(__file__).parent
    sampled: set[str] = set()
    for item in items:
        path = str(item.path.relative_to(here))
        folder = path.partition("/")[0]
        if folder == "slurm":
            item.add_marker("slurm")
        starts_processes = SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ()))
        if folder in SLOW_FOLDERS or starts_processes or (path in SLOW_FILES and path in sampled):
            item.add_marker("slow")
        else:
            sampled.add(path)
    places = {folder: place for place, folder in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(here).parts[0], len(FIRST)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, a test whose marker names what is not here."""
    if item.get_closest_marker("real_model") and "FTLAUNCH_TEST_MODEL" not in os.environ:
        pytest.skip("FTLAUNCH_TEST_MODEL does not name the folder of SmolLM2-135M-Instruct")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-trials", action="store_true", help="make every trial of faults and combinations, not a sample: hours"
    )
