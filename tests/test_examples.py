"""examples/: each is run as it stands on the bundled model, with quick settings, and prints no harmful text."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import safesteer_mlx as safesteer
from safesteer_mlx import report
from safesteer_mlx.method.prompts import SETS, sets_for
from safesteer_mlx.recipe import BUNDLED, model_name

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
QUICK = {"iters": 2, "test_prompts": 4, "direction_train": 32, "direction_validation": 16, "coeff": 0.7}
QUICK |= {"token_samples": 1}

pytestmark = pytest.mark.usefixtures("few_prompts")


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)  # they take seconds, and have their own tests


@pytest.fixture(scope="module")
def aligned(few_prompts, tmp_path_factory) -> tuple[Path, int, str]:
    """What align_and_compare.py made, its exit code and what it printed."""
    import contextlib
    import io

    folder, out = tmp_path_factory.mktemp("example"), io.StringIO()
    words = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["align_and_compare.py", *words, "--set", "report=false"])
        code = program("align_and_compare").main()
    return folder / "adapters-example", code, out.getvalue()


def hold_no_harmful_prompt(said: str) -> None:
    sets = sets_for(model_name(BUNDLED), None)
    harmful = [item for name in SETS if name.startswith("harmful") for item in getattr(sets, name)]
    assert len(harmful) > 100 and not [item for item in harmful if item.text in said]


def test_align_and_compare_counts_both_models(aligned):
    folder, code, said = aligned
    assert code == 0 and (folder / "adapters.safetensors").is_file(), said
    for kind in ("harmful requests answered", "harmless requests refused", "borderline requests refused"):
        assert f"{kind}: " in said
    assert "mean KL(base ‖ aligned)" in said
    hold_no_harmful_prompt(said)


def test_align_and_compare_says_a_mistake_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align_and_compare.py", "--set", "epoch=2"])
    assert program("align_and_compare").main() == 2
    assert "did you mean epochs" in capsys.readouterr().err


def test_an_export_is_served_asked_and_verified(aligned, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["--adapter-path", str(aligned[0]), "--bits", "32", "--prompts", "4"]
    assert program("export_and_serve").main(words) == 0
    said = capfd.readouterr().out
    shown = [line for line in said.splitlines() if line.startswith("$ ")]
    assert [line.split()[1:3] for line in shown] == [
        ["safesteer-mlx", "export"],
        ["mlx_lm.server", "--model"],
        ["safesteer-mlx", "verify"],
    ]
    assert "--host 127.0.0.1" in said and said.count("answers as the scored student does") == 2
    hold_no_harmful_prompt(said)


@pytest.mark.slow
def test_export_and_serve_aligns_first_where_there_is_no_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert program("export_and_serve").main(["--prompts", "24"]) == 0
    assert "$ safesteer-mlx align tiny-chat" in capfd.readouterr().out


def test_a_server_that_does_not_start_in_time_is_a_sentence(tmp_path, monkeypatch):
    example = program("export_and_serve")
    monkeypatch.setattr(example, "WAIT", 0.1)
    with pytest.raises(SystemExit, match="did not start"), example.served(tmp_path / "nothing"):
        pass


def test_the_notebook_is_stripped_and_its_cells_run(tmp_path, monkeypatch, capsys):
    notebook = json.loads((EXAMPLES / "align_and_compare.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    whole = safesteer.align

    def quickly(base, *args, **settings):
        return whole(base, *args, **settings | QUICK)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(safesteer, "align", quickly)
    names: dict = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    said = capsys.readouterr().out
    assert "harmful, comply, sampled: " in said and "drift: " in said and "teacher 0." in said
    assert (tmp_path / "adapters-notebook" / "adapters.safetensors").is_file()
    hold_no_harmful_prompt(said)
