"""Public names of `method.residual`, where they have been since 0.1: the published algorithm."""

from .method.residual import *  # noqa: F403
