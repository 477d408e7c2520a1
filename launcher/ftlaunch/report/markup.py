"""Pieces of a page: text made harmless, tables, sections, and the page around them."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from ftlaunch.safety.redact import redact

STYLE = Path(__file__).with_name("style.css")


def escape(text: object) -> str:
    """Text as a page shows it and never reads it: no markup, no secret."""
    # Redacted first: escaping changes & and quotes, and a pattern might no longer recognise a secret.
    return html.escape(redact(str(text)))


LONG_WORD = 20
"""Characters."""
JOINT, DASHED = re.compile(r"(?<=[./_-])(?=\w)"), re.compile(r"\S+-\S+")
"""Where a long word may be broken, and a word that a browser would break at its dashes."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, wide: bool = False) -> str:
    """A table of texts; empty without rows. A `wide` one keeps its columns, and is moved sideways on a phone."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    kind = ' class="wide"' if wide else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    text = "–" if value is None or value == "" else str(value)
    # In narrow columns words stay whole, dates too; what is longer breaks at its dots and dashes, else anywhere.
    if max(map(len, text.split()), default=0) > LONG_WORD:
        return f'<td class="long">{JOINT.sub("<wbr>", escape(text))}</td>'
    return f"<td>{DASHED.sub(_whole, escape(text))}</td>"


def _whole(word: re.Match[str]) -> str:
    return f'<span class="whole">{word[0]}</span>'


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """A list of names with their values."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in rows)}</dl>"


def section(title: str, *parts: str, level: int = 2) -> str:
    """A part of the page under its heading; empty where nothing is in it."""
    content = "".join(parts)
    return f"<section><h{level}>{escape(title)}</h{level}>{content}</section>" if content else ""


def folded(title: str, content: str) -> str:
    """A part that is opened with a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def page(title: str, body: str) -> str:
    """A whole document that asks nothing of any network: a browser is told to allow it none."""
    # A model's answers are on the page: should markup in one slip through, no script of it runs.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE.read_text()}</style></head>\n<body>{body}</body></html>\n'
    )
