"""Load on tunnels, run by ``tunnel_node.Agent``: sessions that live long, and a stream of new ones; each byte is verified.

Its argument is JSON: ``sessions`` [[host, port, how many], …], ``streams`` [[host, port], …], ``pause`` (seconds between two
exchanges of one session) and ``stream_pause`` (between two connections). Each question is answered with what was seen since the
one before; times are those of CLOCK_MONOTONIC.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
import time

SIZE = 4096
PATIENCE = 30.0
POOL = random.Random(5).randbytes(1 << 20)  # noqa: S311 - a pattern, not a secret


class Tally:
    """What was seen since the last question."""

    def __init__(self):
        self.exchanged = self.opened = self.refused = 0
        self.longest = 0.0  # an exchange of a session took
        self.broken = []  # [when, where, why] of sessions
        self.outages = []  # [from, until, where, why]: from the first connection that failed until one was served
        self.running = {}

    def take(self):
        """All that, and how many sessions there are; an exchange that is not done yet counts with what it took so far."""
        now = time.monotonic()
        self.longest = max([self.longest, *(now - began for began in self.running.values())])
        found = {**vars(self), "running": len(self.running)}
        running = self.running
        self.__init__()
        self.running = running
        return found


tally = Tally()


async def exchange(reader, writer, dice):
    at = dice.randrange(len(POOL) - SIZE)
    content = POOL[at : at + SIZE]
    writer.write(content)
    await writer.drain()
    if await reader.readexactly(SIZE) != content:
        raise ValueError("other bytes came back")


async def session(host, port, number, pause):
    """One long session; it is not opened again when it breaks."""
    dice = random.Random(f"{port} {number}")  # noqa: S311 - a pattern
    me = port, number
    try:
        reader, writer = await asyncio.open_connection(host, port)
        with contextlib.closing(writer):
            while True:
                tally.running[me] = began = time.monotonic()
                async with asyncio.timeout(PATIENCE):
                    await exchange(reader, writer, dice)
                tally.longest = max(tally.longest, time.monotonic() - began)
                tally.exchanged += 1
                await asyncio.sleep(pause)
    except (OSError, EOFError, ValueError) as error:
        tally.broken.append([time.monotonic(), f"{host}:{port}", f"{type(error).__name__}: {error}"])
    finally:
        tally.running.pop(me, None)


async def stream(host, port, pause):
    """New connections, one after the other, each for one exchange."""
    dice = random.Random(port)  # noqa: S311 - a pattern
    outage = None
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(host, port)
                with contextlib.closing(writer):
                    await exchange(reader, writer, dice)
            tally.opened += 1
            if outage:
                tally.outages.append([outage[0], time.monotonic(), f"{host}:{port}", outage[1]])
                outage = None
        except (OSError, EOFError, ValueError) as error:
            tally.refused += 1
            outage = outage or (began, f"{type(error).__name__}: {error}")
        await asyncio.sleep(pause)


async def main(options):
    loop = asyncio.get_running_loop()
    pause = options["pause"]
    tasks = [
        loop.create_task(session(host, port, number, pause))
        for host, port, count in options.get("sessions", ())
        for number in range(count)
    ]
    tasks += [loop.create_task(stream(*end, options["stream_pause"])) for end in options.get("streams", ())]
    questions = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    print('"ready"', flush=True)
    while await questions.readline():
        print(json.dumps(tally.take()), flush=True)
    os._exit(0)


asyncio.run(main(json.loads(sys.argv[1])))
