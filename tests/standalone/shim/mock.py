"""``mock`` as slapos.core's tests import it; the environment has the same only as a part of Python."""

from unittest.mock import *  # noqa: F403 - whatever they use of it
