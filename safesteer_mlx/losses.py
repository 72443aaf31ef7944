"""The public names of `method.losses`, where they have been since 0.1: the published algorithm's own functions."""

from .method.losses import *  # noqa: F403
