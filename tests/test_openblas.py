"""OpenBLAS, where it stands beside MLX's CPU backend."""

import os
import subprocess
import sys

import pytest

from safesteer_mlx import _kernels, _processor_flags

NAME = """
import ctypes, os, safesteer_mlx
library = ctypes.CDLL("libopenblas.so.0")
library.openblas_get_corename.restype = ctypes.c_char_p
print(library.openblas_get_corename().decode(), os.environ.get("OPENBLAS_CORETYPE"))
"""


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("sse4_2 avx avx2 fma avx512f avx512bw avx512dq avx512vl", "SKYLAKEX"),
        ("sse4_2 avx avx2 fma avx512f", "HASWELL"),
        ("sse4_2 avx", None),
    ],
)
def test_the_newest_kernels_that_a_processor_has(flags, kernels):
    assert _kernels(set(flags.split())) == kernels


def loaded(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", NAME],
        env={name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"} | environment,
        capture_output=True,
        text=True,
    )
    if "cannot open shared object" in done.stderr:
        pytest.skip("no OpenBLAS here")
    return done.stdout.split()


def test_a_processor_newer_than_openblas_is_not_taken_for_an_old_one():
    """Fails without it where OpenBLAS does not know the processor; where it does, nothing is to be told."""
    core, left = loaded()
    assert left == "None"
    assert _kernels(_processor_flags()) is None or core != "Prescott"


def test_kernels_that_the_user_chose_are_left():
    assert loaded(OPENBLAS_CORETYPE="PRESCOTT") == ["Prescott", "PRESCOTT"]
