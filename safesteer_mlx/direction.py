"""Public names of `method.direction`, where they have been since 0.1: the published algorithm."""

from .method.direction import *  # noqa: F403
from .method.own_answers import *  # noqa: F403
