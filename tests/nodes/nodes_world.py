"""Worlds of several nodes for tests: those of the demonstration, with every JSON held to its schema, and tenants' hands."""

import contextlib

import tunnel_node
import warm_machines  # noqa: F401 - what it does is done by its import
from json_schemas import validate

from partitiond.demo import node as demo_node
from partitiond.demo import world as demo_world


class Hands(tunnel_node.Node):
    """What tenants of a node do by themselves: files, declarations of tunnels, programs (``tunnel_node``)."""

    def path(self, partition):
        return demo_node.INSTANCES / partition


class Node(demo_node.Node):
    """A node whose verbs are checked; ``hands`` are made anew when it is another machine."""

    _hands = None

    def verb(self, *words, expect=(0,)):
        return validate(super().verb(*words, expect=expect))

    @property
    def hands(self):
        if self._hands is None:
            self._hands = Hands(demo_node.CONFIGURATION, view=self.seen("/"), enter=self.words())
        return self._hands

    def power_off(self):
        if self._hands is not None:
            self._hands.close()
            self._hands = None
        super().power_off()

    def plan(self):
        """What apply would do: one line each."""
        found = self.verb("plan", expect=(0, 2))["operations"]
        return [f"{one['id']}: {one['reason']} ({one['before']} → {one['after']})" for one in found]

    def settled(self):
        assert not self.plan(), f"the plan of {self.name} is not empty: {self.plan()}\n{self.tail()}"


class World(demo_world.World):
    node_class = Node


@contextlib.contextmanager
def standing(nodes=3, **options):
    """A world without daemons (``World.start`` runs them); its logs are printed when a test in it fails."""
    world = World(nodes, **options).up()
    try:
        yield world
    except BaseException:
        for machine in (world.master, *world.nodes):
            print(f"--- {machine.name}\n{machine.tail()}")
        raise
    finally:
        world.close()


def until(condition, what, node=None, seconds=120.0):
    """Wait for a condition and return what it gave."""
    return demo_world.wait_for(condition, what, seconds=seconds, log=node.tail if node else None)
