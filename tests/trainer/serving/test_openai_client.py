"""The client that programs have already: OpenAI's own package, pointed at this server."""

import openai
import pytest


@pytest.fixture
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none is asked for", max_retries=0)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "broken"]


def test_a_streamed_conversation_is_the_whole_one(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "red"}], "temperature": 0, "max_tokens": 9}
    whole = client.chat.completions.create(**asked)
    pieces = client.chat.completions.create(**asked, stream=True)
    text = "".join(event.choices[0].delta.content or "" for event in pieces)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0


def test_a_bare_text_goes_on(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="salt", max_tokens=4, temperature=0)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_refusals_are_the_errors_that_its_users_catch(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.completions.create(model="other", prompt="salt")
    with pytest.raises(openai.BadRequestError, match="max_tokens may be 16 at most"):
        client.completions.create(model="tiny", prompt="salt", max_tokens=99)
    with pytest.raises(openai.InternalServerError, match="could not answer"):
        client.completions.create(model="broken", prompt="salt")
