"""Bodies of requests, in OpenAI's format; a key that is not supported is refused by name, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

HARMLESS: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "best_of": (1, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logprobs": (False, None),
    "top_logprobs": (None,),
    "echo": (False, None),
    "suffix": (None,),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
}
"""OpenAI's keys that are not supported → the values that ask for nothing, which many clients send anyway."""
UNUSED = ("user", "store", "metadata")
"""Keys that cannot change the answer."""


class Message(BaseModel):
    """A turn. Its content is a text, or pieces of text."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _join_pieces(cls, value: Any) -> Any:
        content = value.get("content") if isinstance(value, dict) else None
        if not isinstance(content, list):
            return value
        # Refused as a whole: an answer to a question whose picture was dropped would be wrong without a sign.
        if not all(isinstance(piece, dict) and piece.get("type") == "text" for piece in content):
            raise ValueError("only text is understood, no images and no sound")
        return {**value, "content": "".join(str(piece.get("text", "")) for piece in content)}

    def plain(self) -> dict[str, str]:
        # Newer clients say developer, which no chat template knows.
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(BaseModel):
    """`stream_options` of a request: whether the last piece of a stream says how many tokens there were."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Body(BaseModel):
    """Fields that both kinds of completion have."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key, harmless in HARMLESS.items():
            if key in value and value[key] not in harmless:
                raise ValueError(f"{key} is not supported by this server")
        # Taken out before the fields are checked: `extra="forbid"` then refuses whatever nobody knows by its name.
        return {key: one for key, one in value.items() if key not in (*HARMLESS, *UNUSED)}

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(Body):
    """A conversation to continue."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]


class TextBody(Body):
    """A text to continue."""

    prompt: str
