"""`ftlaunch chat`: what models answer, once or in a conversation."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Dtype, Model
from ftlaunch.recipe.names import holds, is_local, label
from ftlaunch.run.layout import CARD, REWARD_HEAD
from ftlaunch.safety.model_files import ADAPTER_CONFIG
from ftlaunch.tools import ChatOptions
from fttrain import adapters, artifact, hub
from fttrain.answering.conversation import Message, prompt_ids
from fttrain.answering.streaming import Request, answer_together
from fttrain.data.chat import end_ids
from fttrain.distributed.precision import computed_in
from fttrain.merging.merge import find_source
from fttrain.model import completeness
from fttrain.model.families import auto_class_in
from fttrain.model.scorer import DTYPES, remedy
from fttrain.noise import replace_activations
from fttrain.quant import qat
from fttrain.tools.output import run


def load(path: str, device: torch.device | None = None, dtype: Dtype = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer: ID or ID@REVISION of the hub, or the absolute path of a model folder, an artifact or a
    PEFT adapter.

    `dtype` is the number format where the model has no record of the one that it was trained in. It goes to the GPU,
    where there is one, unless a device is named. Raises UserError where they cannot be had or trusted.
    """
    if holds(path, REWARD_HEAD):
        raise UserError(f"{path} is a reward model: it rates answers and gives none", "name a model that answers")
    base = _base(path)
    try:
        folder = hub.model_folder(base.path, base.revision)
        replace_activations.make_known()
        dtype = computed_in(dtype if base.dtype == "auto" else base.dtype, device)
        print(f"{path} is computed in {dtype}", file=sys.stderr)
        loaded: Any = auto_class_in(folder)[0].from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused in the next line, by name
            use_safetensors=True,
            trust_remote_code=False,
        )
        completeness.require(base.path, *loaded)
        model = loaded[0]
        own = Path(path) if is_local(path) else folder
        replace_activations.install(model, replace_activations.read(own))
        has_tokenizer = holds(path, "tokenizer_config.json")
        place, revision = (path, None) if has_tokenizer else (base.path, base.revision)
        tokenizer = artifact.load_tokenizer(place, revision)
        qat.follow_card(model, folder)
        if holds(path, ADAPTER_CONFIG):
            model = _with_adapter(model, Path(path), len(tokenizer))
    except (OSError, ValueError) as error:
        raise UserError(f"no model could be loaded from {path}: {error}", remedy(base.path)) from error
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def recorded_dtype(paths: Sequence[str]) -> Dtype:
    """The first recorded format of models that are compared: a base is then computed as what was made of it."""
    known: list[Dtype] = [found for path in paths if (found := _base(path).dtype) != "auto"]
    return known[0] if known else "auto"


def _base(path: str) -> Model:
    """An adapter's base, at the revision that it was trained on; else the model itself."""
    if holds(path, ADAPTER_CONFIG):
        return find_source(Path(path)).base
    if is_local(path):
        return Model(path=path)
    name, _, revision = path.partition("@")
    return Model(path=name, revision=revision or None)


def base_of(path: str) -> str:
    """What an adapter, or a merged model of a run, was made from: a folder or ID@REVISION. UserError where unknown."""
    if holds(path, ADAPTER_CONFIG):
        base = _base(path)
        return base.path + (f"@{base.revision}" if base.revision else "")
    raise UserError(f"{path} does not say what its base is", "name the other model instead of base")


def _with_adapter(model: Any, adapter: Path, vocabulary: int) -> Any:
    if vocabulary > model.get_input_embeddings().weight.shape[0]:  # the adapter was trained with tokens of its own
        model.resize_token_embeddings(vocabulary)
    wrapped: Any = adapters.with_saved(model, adapter)
    if (adapter / CARD).exists() and (rounding := artifact.read(adapter)[0].rounding):
        qat.install(wrapped, rounding, adapter)
    return wrapped


def say(
    model: Any,
    tokenizer: Any,
    messages: list[Message],
    max_new_tokens: int,
    tell: Callable[[str], None] = lambda _: None,
    temperature: float = 0.0,
) -> str:
    """The model's answer to a conversation; `tell` is given each piece of it as it is made."""
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        tell(piece)

    ids = prompt_ids(tokenizer, messages)
    answer_together(model, tokenizer, [Request(ids, max_new_tokens, take, temperature)], end_ids(tokenizer))
    return "".join(pieces).strip()


def main(options: ChatOptions) -> Iterator[str]:
    """Answer the prompt, or talk until the user leaves."""
    talk = _conversation(options, sys.stdin, sys.stdout)
    return talk if options.prompt is None else _replies(options, options.prompt)


def _replies(options: ChatOptions, prompt: str) -> Iterator[str]:
    longest = options.max_new_tokens or SHORT
    yield f"prompt: {prompt}"
    for path in options.models:
        model, tokenizer = load(path, dtype=recorded_dtype(options.models))
        turn = [{"role": "user", "content": prompt}]
        text = say(model, tokenizer, turn, longest, temperature=options.temperature)
        yield f"\n{label(path)}:\n  {text}"


SHORT, LONG = 64, 512
"""Tokens of an answer to one prompt, and in a conversation, where the user names no number."""
HELP = (
    "Write, and each model answers. /reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short."
)


def _conversation(options: ChatOptions, source: TextIO, out: TextIO) -> Iterator[str]:
    """A conversation with every model, line by line; each has its own history. Answers appear as they are made."""
    models = {path: load(path, dtype=recorded_dtype(options.models)) for path in options.models}
    history: dict[str, list[Message]] = {path: [] for path in models}
    is_person = source.isatty()
    print(HELP, file=sys.stderr)
    while True:
        if is_person:
            print("\nyou: ", end="", file=out, flush=True)
        line = source.readline()
        if not line or line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            history = {path: [] for path in models}
            print("forgotten", file=sys.stderr)
        elif line.strip():
            for path, (model, tokenizer) in models.items():
                yield f"\n{label(path)}:"
                _take_turn(model, tokenizer, history[path], line.strip(), options, out)


def _take_turn(model: Any, tokenizer: Any, turns: list[Message], said: str, options: ChatOptions, out: TextIO) -> None:
    """One turn of the user and one of the model, told as it is made; both are added to `turns`."""
    turns.append({"role": "user", "content": said})
    pieces: list[str] = []

    def tell(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", file=out, flush=True)

    with contextlib.suppress(KeyboardInterrupt):  # it cuts the answer short, and what was said of it stays
        say(model, tokenizer, turns, options.max_new_tokens or LONG, tell, options.temperature)
    print(file=out, flush=True)
    turns.append({"role": "assistant", "content": "".join(pieces).strip()})


if __name__ == "__main__":
    run(main, ChatOptions)
