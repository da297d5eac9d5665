"""A machine that was copied with its key: two nodes of one name, which a third one knows."""

import shutil

from mesh_world import TINC, standing, until


def test_a_machine_that_is_copied():
    with standing() as world:
        a, b, copy = (world[name] for name in "ABC")
        for node in (a, b):
            node.verb("apply")
        a.take_in(b.export())
        b.take_in(a.export())
        until(lambda: a.reaches("B"), "B to be reached")
        shutil.copytree(b.seen(TINC), copy.seen(TINC), dirs_exist_ok=True)
        copy.configure({"tinc": {"name": "B", "index": b.sections["tinc"]["index"]}})
        copy.verb("apply")
        words = "two nodes have its name and key"
        until(lambda: words in (a.peers()["B"]["problem"] or ""), "A to see that there are two")
        assert any(words in one for one in a.verb("status")["node"]["open_cases"])
        copy.verb("teardown")
        b.kill_tincd()  # or it waits before it tries again
        until(lambda: a.reaches("B") and b.reaches("A"), "B to be the one that is reached")
