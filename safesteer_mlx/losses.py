"""Public names of `method.losses`, where they have been since 0.1: the published algorithm."""

from .method.losses import *  # noqa: F403
