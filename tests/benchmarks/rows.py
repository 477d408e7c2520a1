"""How long many rows take before the first step, against `datasets.map` with as many processes.

    python tests/benchmarks/rows.py --model .cache/SmolLM2-135M-Instruct --rows 1000000

Both sides render the same rows by the model's chat template and tokenize them, each in a process of its own with an
empty cache; datasets does nothing else, we find borders of answers, check the rows and count them. Their tokens must be
as many. Then: a file of 300 MB that is one JSON list, how much memory more rows take, `ftlaunch validate`, and how soon
a stop is heeded. CPU seconds are those of all processes: they say more than the wall does on a busy machine. The last
line is their wall over ours.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__)
WORDS = (HERE.parents[2] / "README.md").read_text().split()
RECIPE = """
name = "many"
[model]
path = "{model}"
[data.rows]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
[[stage]]
kind = "sft"
data = "rows"
steps = 1
"""


def rows(count: int, words: int) -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(count):
        asked, said = " ".join(draw.choices(WORDS, k=words // 3)), " ".join(draw.choices(WORDS, k=words))
        yield json.dumps({"question": asked, "answer": said})


def write_list(path: Path, size: int) -> None:
    """One JSON list of long rows, of so many bytes."""
    with path.open("w") as file:
        file.write("[")
        for number, row in enumerate(rows(sys.maxsize, 400)):
            file.write((",\n" if number else "") + row)
            if file.tell() > size:
                break
        file.write("]\n")


def _tokenizer(model: str) -> Any:
    from fttrain.model import tokenizer

    return tokenizer.load(model)


def ours(path: str, model: str, cores: int) -> int:
    """Tokens that the stage would train on."""
    from ftlaunch.recipe.data import Data
    from fttrain.data.tokens import tokenize

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    data = Data(path=path, prompt="{question}", completion="{answer}", max_length=1 << 20)
    with tempfile.TemporaryDirectory() as cache:
        return tokenize(data, _tokenizer(model), 0, Path(cache)).counts.tokens


def theirs(path: str, model: str, cores: int) -> int:
    from datasets import load_dataset

    tokenizer = _tokenizer(model)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        chats = [
            [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            for asked, said in zip(batch["question"], batch["answer"], strict=True)
        ]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        return {"ids": ids, "length": [len(row) for row in ids]}

    with tempfile.TemporaryDirectory() as cache:
        found = load_dataset("json", data_files=path, split="train", cache_dir=cache)
        return sum(found.map(encode, batched=True, num_proc=cores, remove_columns=found.column_names)["length"])


def stop(path: str, model: str, _: int) -> float:
    """Seconds from a stop to the end of the work, once it is well under way."""
    from ftlaunch.recipe.data import Data
    from fttrain.data.prepare import Work

    data = Data(path=path, prompt="{question}", completion="{answer}", max_length=1 << 20)
    with tempfile.TemporaryDirectory() as cache:
        work = Work([data], _tokenizer(model), Path(cache))
        while work.done < 8000 and not work.is_over(0.1):
            pass
        asked = time.perf_counter()
        work.stop.set()
        while not work.is_over(0.01):
            pass
        return time.perf_counter() - asked


def measured(what: str, path: Path, model: str, cores: int) -> tuple[float, float, float, float]:
    """(what it returned, seconds of wall, seconds of CPU, peak MB of its largest process)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, HERE, "--model", model, "--do", what, "--path", path, "--cores", str(cores)]
    started = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    returned, peak = map(float, done.stdout.split()[-2:])
    return returned, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def _print_times(name: str, found: tuple[float, float, float, float]) -> None:
    tokens, wall, cpu, peak = found
    print(f"{name:34s} {wall:7.1f} s wall {cpu:7.1f} s CPU {peak:7.0f} MB {tokens:12,.0f} tokens", flush=True)


def validate(folder: Path, path: Path, model: str) -> None:
    recipe = folder / "many.toml"
    recipe.write_text(RECIPE.format(model=Path(model).absolute(), rows=path))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "ftlaunch", "validate", recipe], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"validate {path.name:25s} {time.perf_counter() - started:7.1f} s wall {cpu:7.1f} s CPU", flush=True)


def compare(model: str, count: int, cores: int, megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        many, some, listed = folder / "many.jsonl", folder / "some.jsonl", folder / "listed.json"
        for path, number in ((many, count), (some, count // 10)):
            path.write_text("".join(f"{row}\n" for row in rows(number, 24)))
        write_list(listed, megabytes << 20)
        for path in (many, listed):
            validate(folder, path, model)
        mine = measured("ours", many, model, cores)
        _print_times(f"ours, {count} rows", mine)
        other = measured("theirs", many, model, cores)
        _print_times(f"datasets.map, {count} rows", other)
        assert mine[0] == other[0], "other tokens"
        _print_times(f"ours, {count // 10} rows", measured("ours", some, model, cores))
        _print_times(f"ours, a list of {megabytes} MB", measured("ours", listed, model, cores))
        print(f"a stop is heeded after {measured('stop', many, model, cores)[0]:.2f} s")
        print(f"CPU ratio {other[2] / mine[2]:.2f}")
        print(f"ratio {other[1] / mine[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--do", choices=["ours", "theirs", "stop"], help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.do:
        # A path that begins with neither / nor ./ would be taken for a hub id.
        compare(str(Path(options.model).resolve()), options.rows, options.cores, options.megabytes)
        return
    returned = {"ours": ours, "theirs": theirs, "stop": stop}[options.do](options.path, options.model, options.cores)
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(returned, max(own, children) / 1024)


if __name__ == "__main__":
    main()
