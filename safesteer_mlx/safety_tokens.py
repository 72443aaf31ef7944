"""Public names of `method.safety_tokens`, where they have been since 0.1: the published algorithm."""

from .method.safety_tokens import *  # noqa: F403
