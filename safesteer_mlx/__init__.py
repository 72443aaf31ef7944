"""safesteer-mlx: safety alignment of chat models on Apple's MLX by localized on-policy distillation.

The method is SafeSteer (arXiv 2606.02530). `align.py` reads as its method section; every stage is a
function in a module of its own. Nothing heavy is imported here, so that `--help` stays quick.
"""

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("safesteer-mlx")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def _prefer_openblas() -> None:
    """On Linux let MLX's CPU backend use the system's OpenBLAS where there is one.

    MLX's Linux wheel carries the reference BLAS; a library loaded earlier with global symbols takes
    precedence over it, and OpenBLAS multiplies float32 matrices 20 to 40 times faster.
    """
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        try:
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
        except OSError:
            pass


_prefer_openblas()
