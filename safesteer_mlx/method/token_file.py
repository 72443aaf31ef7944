"""A file of safety tokens: a JSON list of `{"token": text, "id": number}`, as `run/tokens.json` is one.

Text and id must agree, since an id alone means another word in another model.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipe import MOST_TOKENS
from ..system.files import read_json, user_path
from ..system.screen import UserError, visible
from .prompts import special_ids


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The file's tokens in order, each with text and id at least.

    Raises:
        UserError: the file cannot be read, is not such a list, is empty, or holds an id twice.
    """
    rows = read_json(user_path(path), f"token file {path}", "make one with python -m safesteer_mlx.tokens")
    if not isinstance(rows, list) or not all(map(_is_row, rows)) or not rows:
        raise UserError(
            f'token file {path} is not a list of {{"token": text, "id": number}}; make one with '
            "python -m safesteer_mlx.tokens"
        )
    if len(rows) > MOST_TOKENS:
        raise UserError(f"token file {path} holds {len(rows):,} tokens; keep at most {MOST_TOKENS:,}")
    twice = [i for i, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise UserError(f"token file {path} holds id {min(twice)} twice; remove one")
    return rows


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("token"), str) and type(row.get("id")) is int


def read_token_file(path: Path, tokenizer: Any, vocabulary: int) -> list[int]:
    """The file's ids, checked against a model's own tokens.

    Raises:
        UserError: as `read_rows`, or a token is not this model's.
    """
    rows = read_rows(path)
    check_fit(str(path), rows, tokenizer, vocabulary)
    return [row["id"] for row in rows]


def check_fit(where: str, rows: Sequence[Mapping[str, Any]], tokenizer: Any, vocabulary: int) -> None:
    """Hold tokens against a model's vocabulary of V ids.

    Raises:
        UserError: an id outside the vocabulary, a special token, or one that is another text in this model.
    """
    special = set(special_ids(tokenizer, vocabulary))
    for row in rows:
        which = f"{where}: token {quoted(row['token'])}, id {row['id']},"
        if not 0 <= row["id"] < vocabulary:
            raise UserError(f"{which} is none of this model's {vocabulary}; give a file made for this model")
        if row["id"] in special:
            raise UserError(f"{which} is a special token of this model, which no answer's text holds; leave it out")
        if (own := tokenizer.decode([row["id"]])) != row["token"]:
            raise UserError(f"{which} is {quoted(own)} in this model; give a file made for this model")


def quoted(text: str) -> str:
    """A token as people see it: in quotes, so that a leading space shows, and on one line."""
    return f"“{visible(text, '')}”"
