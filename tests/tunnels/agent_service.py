"""A service that echoes, run by ``tunnel_node.Agent``: asked, it says how many connections and bytes it ever saw.

Its argument is JSON: host, port, and to stand in for a tunnel's end ``certificate`` (PEM with key) and ``versions``; what it
counts is then what came out of TLS. ``needle`` (hexadecimal) is looked for in what each connection brings.
"""

import asyncio
import json
import os
import ssl
import sys

seen = {"connections": 0, "bytes": 0, "needles": 0}


def demanding_nothing(pem, versions):
    """TLS as lenient as can be, for any certificate and version."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    lowest, highest = versions or ("TLSv1_1", "TLSv1_3")
    context.minimum_version, context.maximum_version = ssl.TLSVersion[lowest], ssl.TLSVersion[highest]
    file = os.memfd_create("pair")
    os.write(file, pem.encode())
    context.load_cert_chain(f"/proc/self/fd/{file}")
    os.close(file)
    return context


def serving(needle):
    async def serve(reader, writer):
        seen["connections"] += 1
        tail = b""
        found = False
        try:
            while piece := await reader.read(1 << 16):
                seen["bytes"] += len(piece)
                if needle and not found and needle in (tail := tail[-len(needle) :] + piece):
                    found = True
                    seen["needles"] += 1
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass  # the other side went away
        finally:
            writer.close()

    return serve


async def main(options):
    pem = options.get("certificate")
    context = demanding_nothing(pem, options.get("versions")) if pem else None
    needle = bytes.fromhex(options.get("needle", ""))
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # handshakes that fail are what some tests want
    await asyncio.start_server(serving(needle), options["host"], options["port"], ssl=context, backlog=1024)
    questions = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(questions), sys.stdin)
    print('"ready"', flush=True)
    while await questions.readline():
        print(json.dumps(seen), flush=True)
    os._exit(0)


asyncio.run(main(json.loads(sys.argv[1])))
