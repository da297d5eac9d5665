"""Work that is killed between two calls into the kernel."""

import os

CALLS = ("mkdir", "rename", "symlink", "unlink", "rmdir", "fsync", "write")


class Killed(BaseException):
    pass


def cut_short(monkeypatch, after, work, calls=CALLS):
    """Do it until so many calls were made; whether it came to its end."""
    left = after

    def dying(original):
        def call(*arguments, **more):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except Killed:
            return False
    return True
