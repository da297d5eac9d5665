"""Run by the buildout of an instance, with ``self``: what it does is decided by the instance's parameters.

``text`` is served at port 8000 of the private IPv4 address; ``sleep`` keeps the buildout busy with a process of its own;
``fail`` ends it with that message; ``prerm``, ``promise`` and ``destroy`` are what programs of these names do;
``tunnel`` is the port of a tunnel to the page, at ``$PUBLIC``.
"""
# ruff: noqa: F821, S310, S314, S323, PTH101, PTH108, PTH110, PTH103 - a name of the recipe; the master is the test's own; plain code for a plain place

import json
import os
import ssl
import subprocess
import urllib.request
from html import unescape
from urllib.parse import urlencode
from xml.etree import ElementTree

import zc.buildout

slap = self.buildout["slap-connection"]
query = urlencode(
    {"computer_reference": slap["computer-id"], "computer_partition_reference": slap["partition-id"]}
)
# the protocol escapes each text twice
context = None
if slap["key-file"]:
    # as the client library of slapos.core has it: with the instance's own pair, and without a look at the master's
    context = ssl._create_unverified_context()
    context.load_cert_chain(slap["cert-file"], slap["key-file"])
with urllib.request.urlopen(
    f"{slap['server-url']}registerComputerPartition?{query}", context=context
) as answer:
    texts = [
        unescape(item.text or "")
        for item in ElementTree.fromstring(answer.read()).iter()
        if item.tag == "string"
    ]


def parameter(name):
    return texts[texts.index(name) + 1] if name in texts else ""


here = self.buildout["buildout"]["directory"]
print("parameters:", *(f"{name}={parameter(name)}" for name in ("text", "sleep", "fail")), flush=True)
if parameter("sleep"):
    subprocess.check_call(["/bin/sleep", parameter("sleep")])
if parameter("fail"):
    raise zc.buildout.UserError(parameter("fail"))

with open("/tmp/of-the-buildout", "w") as mark:
    mark.write(slap["partition-id"])
with open(os.path.join(here, ".slapos-resource")) as stream:
    resource = json.load(stream)
ipv4 = next(row["addr"] for row in resource["address_list"] if ":" not in row["addr"])
public = next((row["addr"] for row in resource["address_list"] if row["addr"] != ipv4), "")
for name in ("srv", "etc", "etc/run", "etc/service", "etc/promise", "etc/prerm", "etc/tunnel", "sbin"):
    os.makedirs(os.path.join(here, name), exist_ok=True)
with open(os.path.join(here, "srv", "index.html"), "w") as page:
    page.write(parameter("text"))
if parameter("tunnel"):
    with open(os.path.join(here, "etc", "tunnel", "page.cfg"), "w") as declared:
        allowed = f"listen = {parameter('tunnel')}\nconnect = 8000\nallow = cert:{resource['certificate']}\n"
        declared.write(f"[tunnel]\nmode = server\n{allowed}")
python = self.buildout["buildout"]["executable"]
programs = {
    "etc/service/http": f"exec {python} -m http.server --bind {ipv4} --directory {here}/srv 8000",
    "etc/run/sleeper": "exec /bin/sleep 1000000",
}
for name, kind in (
    ("promise", "etc/promise/check"),
    ("prerm", "etc/prerm/farewell"),
    ("destroy", "sbin/destroy"),
):
    if parameter(name):
        programs[kind] = parameter(name)
    elif os.path.exists(os.path.join(here, kind)):
        os.unlink(os.path.join(here, kind))
for name, line in programs.items():
    path = os.path.join(here, name)
    with open(path, "w") as script:
        script.write(f"#!/bin/sh\nPUBLIC={public}\n{line}\n")
    os.chmod(path, 0o700)
