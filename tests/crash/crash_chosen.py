"""Which points of a run are taken: all of them, those of a kind, some by chance."""

import os
import random
import secrets

from crash_points import family

SEED = int(os.environ.get("CRASHSEED") or secrets.randbelow(10**6))
# what a point is of the network: each is another state of the kernel, at any number of partitions
_NETWORK = ("rtnetlink", "nft", "fcntl.ioctl")
_PROCESSES = ("supervisor.", "subprocess", "started", "os.kill")


def chance():
    return random.Random(SEED)  # noqa: S311 - to be repeated, not to be secret


def every(labels):
    return range(len(labels))


def thinned(labels):
    """Every point of the network; of what is done to a file or directory for each partition alike, one by chance.

    What is done once for the node is left out: it is the same with one partition, where every point is taken.
    """
    dice, alike = chance(), {}
    for place, label in enumerate(labels):
        alike.setdefault(family(label), []).append(place)
    network = [place for place, label in enumerate(labels) if label.startswith(_NETWORK)]
    return sorted({*network, *(dice.choice(places) for places in alike.values() if len(places) > 1)})


def at_processes(labels):
    """What is done to processes, and the point after it."""
    found = {place for place, label in enumerate(labels) if label.startswith(_PROCESSES)}
    return sorted(place for place in found | {place + 1 for place in found} if place < len(labels))


def refusable(labels):
    """Whatever the kernel can refuse of the network, and some points of the rest by chance."""
    network = {place for place, label in enumerate(labels) if label.startswith((*_NETWORK, "open /proc/sys"))}
    return sorted(network | set(some(10)(labels)))


def some(count):
    """So many points by chance."""

    def sample(labels):
        return sorted(chance().sample(range(len(labels)), min(count, len(labels))))

    return sample
