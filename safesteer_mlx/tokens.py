"""The token inspector: `python -m safesteer_mlx.tokens RUN [--veto TEXT …] [--add TEXT …]`.

Shows a run's safety tokens, and writes an edited set for `align --safety-tokens FILE`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import Parser, read_yaml
from .system.files import check_out, write_out
from .system.hub import prepare
from .system.screen import Screen, UserError, command_line, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]


def show(rows: "Sequence[Row]", screen: Screen) -> None:
    """The table: text, id, votes, mean Δ, mean probability under base and teacher; – for what was not measured."""
    from .method.token_file import quoted

    columns = (("votes", "d"), ("mean_delta", "+.2f"), ("base_prob", ".2g"), ("teacher_prob", ".2g"))

    def number(row: Row, name: str, form: str) -> str:
        value = row.get(name)
        return format(value, form) if type(value) in (int, float) and (form != "d" or type(value) is int) else "–"

    cells = [[quoted(row["token"]), str(row["id"]), *(number(row, *column) for column in columns)] for row in rows]
    screen.table("Safety tokens", ["token", "id", "votes", "mean Δ, nats", "p, base", "p, teacher"], cells)


def vetoed(rows: "Sequence[Row]", texts: "Sequence[str]") -> list[Row]:
    """`rows` without those that `texts` name, by text or as id:NUMBER.

    Raises:
        UserError: a text that is none of them, or nothing is left.
    """
    veto: set[int] = set()
    for text in texts:
        ids = {row["id"] for row in rows if text in (row["token"], f"id:{row['id']}")}
        if not ids:
            raise UserError(
                f"--veto {visible(text, '')!r} is none of this run's safety tokens; give one as the table has it, "
                "leading space included, or id:NUMBER"
            )
        veto |= ids
    left = [row for row in rows if row["id"] not in veto]
    if not left:
        raise UserError("--veto leaves no safety token; keep at least one")
    return left


def added(rows: "Sequence[Row]", texts: "Sequence[str]", tokenizer: Any, vocabulary: int) -> list[Row]:
    """`rows` and the tokens that `texts` name, by text or as id:NUMBER.

    Raises:
        UserError: a text that is no single token of the model, a special one, or one that is there already.
    """
    from .method.token_file import check_fit

    rows = list(rows)
    for text in texts:
        subject = f"--add {visible(text, '')!r}"
        number = text.removeprefix("id:")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if number != text and number.isascii() and number.isdigit() and len(number) <= 20:  # Python reads 4,300 digits
            ids = [int(number)]
            text = tokenizer.decode(ids) if ids[0] < vocabulary else ""
        if len(ids) != 1:
            raise UserError(f"{subject} is {len(ids)} tokens of this model; give a single one, or id:NUMBER")
        if ids[0] in (row["id"] for row in rows):
            raise UserError(f"{subject} is a safety token already; leave it out")
        row = {"token": text, "id": ids[0]}
        check_fit("--add", [row], tokenizer, vocabulary)
        rows.append(row)
    return rows


def _tokenizer(run: Path, trust_remote_code: bool) -> tuple[Any, int]:
    """The tokenizer of the run's model, and its V."""
    from .system.load import find_tokenizer

    recipe = read_yaml(run / "recipe.yaml")
    return find_tokenizer(str(recipe.get("model")), recipe.get("revision"), trust_remote_code)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: an unknown flag, or a file that would be replaced.
    """
    parser = Parser("tokens", "Show a run's safety tokens, and write an edited set for align --safety-tokens FILE.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run/ folder, or the adapter folder that holds it")
    more = {"nargs": "+", "action": "extend", "default": [], "metavar": "TEXT"}
    add("--veto", help="tokens to leave out, as the table has them, or id:NUMBER", **more)
    add("--add", help="tokens to put in: single tokens of the model, or id:NUMBER", **more)
    add("--out", type=Path, metavar="FILE", default=Path("safety_tokens.json"), help="(default: safety_tokens.json)")
    add("--offline", action="store_true", help="make no connection, as HF_HUB_OFFLINE=1")
    add("--trust-remote-code", action="store_true", help="let the tokenizer's own code run")
    args = parser.parse_args(argv)
    if args.veto or args.add:
        check_out(args.out, "--out")
        if args.out.exists():
            raise UserError(f"--out {args.out} exists already; give another file")
    return args


@command_line
def main(argv: list[str]) -> None:
    """Show the tokens, and write an edited set if that is asked."""
    args = parse(argv)
    prepare(args.offline)
    from .method.token_file import read_rows
    from .report import run_folder

    run, screen = run_folder(args.run), Screen()
    rows = read_rows(run / "tokens.json")
    if args.veto:
        rows = vetoed(rows, args.veto)
    if args.add:
        rows = added(rows, args.add, *_tokenizer(run, args.trust_remote_code))
    show(rows, screen)
    if args.veto or args.add:
        tokens = [{"token": row["token"], "id": row["id"]} for row in rows]
        write_out(args.out, json.dumps(tokens, indent=2, ensure_ascii=False) + "\n")
        screen.line(f"{len(tokens)} tokens in {args.out}; align with --safety-tokens {args.out}")


if __name__ == "__main__":
    sys.exit(main())
