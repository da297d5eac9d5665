"""What several files of these tests stand on."""

import pytest
from trial_scene import Uplink


@pytest.fixture
def uplink():
    """The only uplink of a node, its operator at the other end."""
    scene = Uplink()
    try:
        scene.up()
        yield scene
    finally:
        scene.close()
