"""Somebody who connects to tunnels, rightfully or not, run by ``tunnel_node.Agent``: each question is a list of attempts.

An attempt has ``to`` [host, port] and ``send`` (hexadecimal, ``times``), and may have ``patience`` in seconds. For TLS also
``tls`` (a version), ``certificate`` (PEM with key) and ``session``, a name under which the TLS session is kept, and resumed if
known. With ``hold`` the connection is kept open under that name, and ``held`` uses it again. The answer says whether what
was sent came back, and why not.
"""

import json
import os
import socket
import ssl
import sys

PATIENCE = 3.0
contexts, sessions, held = {}, {}, {}


def context_of(version, pem):
    if (version, pem) in contexts:
        return contexts[version, pem]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    if pem:
        file = os.memfd_create("pair")
        os.write(file, pem.encode())
        context.load_cert_chain(f"/proc/self/fd/{file}")
        os.close(file)
    contexts[version, pem] = context
    return context


def exchange(stream, question):
    content = bytes.fromhex(question["send"])
    for _ in range(question.get("times", 1)):
        stream.sendall(content)
        answer = b""
        while len(answer) < len(content):
            piece = stream.recv(65536)
            if not piece:
                return False
            answer += piece
        if answer != content:
            raise OSError("other bytes came back")
    return True


def attempt(question):
    answer = {"echo": False, "why": "", "resumed": False}
    if "held" in question:
        answer["echo"] = exchange(held[question["held"]], question)
        return answer
    name = question.get("session")
    stream = socket.create_connection(tuple(question["to"]), timeout=question.get("patience", PATIENCE))
    try:
        if version := question.get("tls"):
            context = context_of(version, question.get("certificate"))
            stream = context.wrap_socket(stream, session=sessions.get(name))
        answer["echo"] = exchange(stream, question)
        if version:
            answer["resumed"] = bool(stream.session_reused)
            if name and stream.session is not None:
                sessions[name] = stream.session
        if "hold" in question:
            held[question["hold"]] = stream
    finally:
        if "hold" not in question or question["hold"] not in held:
            stream.close()
    return answer


def tried(question):
    try:
        return attempt(question)
    except OSError as error:
        return {"echo": False, "why": f"{type(error).__name__}: {error}", "resumed": False}


print('"ready"', flush=True)
for line in sys.stdin:
    print(json.dumps([tried(question) for question in json.loads(line)]), flush=True)
