"""Scenes of the crash matrix: what a node is brought from and to, round and round.

A :class:`Round` is a list of steps after which the machine is as it was before the first: create and remove, grow and shrink,
change and change back. So each step is the next one's preparation, and whatever one leaves behind, the next rounds meet it.

To add one: write its configuration with :func:`configuration` (settings by section; it is text, so what a setting makes
of the node is not this module's affair), make what the configuration stands on in a function like :func:`bridge`, and
add the round to ``rounds``. Points and comparison need no word about new kinds of operations.
"""

import functools
import json
import os
import re
import shutil
from base64 import b64encode
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crash_machine import BASE, ip

from accounting.allowance import Standing
from netplan import tinc_status
from partitiond import tunnel_declarations
from partitiond.errors import PartitiondError
from partitiond.quotas import QuotaBook
from partitiond.supervision import MESH, Supervisor
from stunnel_mgr.identity import make_identity
from stunnel_mgr.render import listens


def nothing():
    """Do nothing: the step needs no more."""


@dataclass(frozen=True)
class Step:
    """One command of the operator's: ``apply`` of a configuration, or ``teardown`` (with ``--purge``) of it.

    ``before`` is done to the machine first; ``after`` takes away what the step leaves on purpose.
    """

    name: str
    configuration: str
    remove: bool = False
    purge: bool = True
    before: Callable[[], None] = nothing
    after: Callable[[], None] = nothing


@dataclass(frozen=True)
class Round:
    """Steps that lead back to where they began; ``prepare`` makes what they stand on, in a new machine."""

    prepare: Callable[[], None]
    steps: tuple[Step, ...]


# --- what a node stands on --------------------------------------------------------------------------------------------


def bridge():
    """A bridge with an Ethernet port, the node's address on it, a default route; and what is nobody's business of ours."""
    ip(
        "link set lo up",
        "link add br0 address 02:00:00:00:00:02 type bridge",
        "link set br0 up",
        "link add eth0 type veth peer name far",
        "link set eth0 master br0 up",
        "link set far up",
        "address add 2001:db8:1::2/64 dev br0 nodad",
        "address add 192.0.2.2/24 dev br0",
        "route add default via 2001:db8:1::1 dev br0",
        "route add 198.51.100.0/24 via 192.0.2.1",
        "rule add from 192.0.2.99 table 100 priority 500",
    )
    Path("/proc/sys/net/ipv4/ip_local_reserved_ports").write_text("3307,8080-8090\n")


def uplink():
    """An Ethernet port that the node is reached by, with addresses and routes of several kinds, and no bridge."""
    ip(
        "link set lo up",
        "link add eth0 address 02:00:00:00:00:02 type veth peer name far",
        "link set far up",
        "link set eth0 up",
        "address add 2001:db8:1::2/64 dev eth0 nodad",
        "address add 192.0.2.2/24 dev eth0",
        "address add 192.0.2.9/24 dev eth0",
        "route add default via 192.0.2.1 src 192.0.2.9 metric 50",
        "route add 203.0.113.5 dev eth0 scope link",
        "route add 203.0.114.0/24 via 203.0.113.5",
        "route add default via 2001:db8:1::1 dev eth0",
    )


def configuration(partitions, **settings):
    """The text of a configuration; ``settings`` are section={key: value}, and None takes a key away."""
    sections = {
        "slapos": {
            "computer_id": "COMP-1",
            "master_url": "http://127.0.0.1:1/",
            "software_root": BASE / "software",
            "instance_root": BASE / "instance",
        },
        "slapformat": {"interface_name": "br0", "partition_amount": partitions},
        "partitiond": {
            "bridge": "br0",
            "state_dir": BASE / "state",
            "log_dir": BASE / "log",
            "run_dir": BASE / "run",
        },
    }
    for section, values in settings.items():
        sections.setdefault(section, {}).update(values)
    return "".join(
        f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items() if value is not None)
        for section, values in sections.items()
    )


@functools.cache
def _peer():
    """The certificate of somebody who may use a tunnel."""
    import ssl

    return b64encode(ssl.PEM_cert_to_DER_cert(make_identity("peer").certificate_pem.decode())).decode()


def tunnel(partition, port=3306):
    """Settings of an operator's tunnel."""
    return {
        "partition": partition,
        "mode": "server",
        "listen": port,
        "connect": port,
        "allow": f"cert:{_peer()}",
    }


# --- rounds -----------------------------------------------------------------------------------------------------------


def rounds(count):
    """The rounds of the matrix for a node of so many partitions, by name."""
    whole, half = configuration(count), configuration(count // 2)
    other = configuration(
        count,
        slapos={"computer_id": "COMP-2"},
        slapformat={
            "tap_base_name": "othertap",
            "user_base_name": "otheruser",
            "software_user": "othersoft",
            "ipv4_local_network": "10.99.0.0/16",
            "partition_has_ipv6_range": "false",
        },
    )
    tunnels = [configuration(count, **{"tunnel db": tunnel("slappart0", port)}) for port in (3306, 3308)]
    # nobody may use it: there is its port, and no stunnel
    idle = configuration(count, **{"tunnel db": tunnel("slappart0") | {"allow": ""}})
    moved = configuration(
        count, slapformat={"interface_name": "eth0"}, partitiond={"bridge": "br1", "bridge_ports": "eth0"}
    )
    routed = configuration(
        count,
        slapformat={"interface_name": "eth0", "create_tun": "true"},
        partitiond={"bridge": None},
        routable_ipv4={"slappart0": "198.51.100.7/24 via 198.51.100.1"},
    )
    mesh = configuration(count, tinc={"network": "10.64.0.0/16", "index": 1, "directory": BASE / "tinc"})
    limited = configuration(count, quota={"default": "1 kB limit 8 kbit/s"})
    return {
        "limit, lift": Round(
            bridge, (Step("limit", limited, before=use_up), Step("lift", whole, before=use_up))
        ),
        "bridge, route, remove": Round(
            uplink, (Step("bridge", moved), Step("route", routed), Step("unroute", routed, remove=True))
        ),
        "create, remove": Round(bridge, (Step("create", whole), Step("remove", whole, remove=True))),
        "join, leave": Round(bridge, (Step("join", mesh), Step("leave", whole))),
        "take down, set up": Round(
            bridge, (Step("take down", idle, remove=True, purge=False), Step("set up", idle))
        ),
        "grow, shrink": Round(bridge, (Step("grow", whole), Step("shrink", half, after=forget_leavers))),
        "change, change back": Round(
            bridge, (Step("change", other, before=damage), Step("change back", whole, before=damage))
        ),
        "tunnel": Round(
            bridge,
            (
                Step("add a tunnel", tunnels[0]),
                Step("change a tunnel", tunnels[1]),
                Step("drop a tunnel", whole),
            ),
        ),
    }


def forget_leavers():
    """Remove the directories of partitions that are no more: a smaller node keeps their data on purpose."""
    homes = {line.split(":")[5] for line in Path("/etc/passwd").read_text().splitlines()}
    for path in (BASE / "instance").glob("slappart*"):
        if str(path) not in homes:
            for one in (path, BASE / "log" / path.name, BASE / "state" / "tunnels" / path.name):
                shutil.rmtree(one, ignore_errors=True)


def use_up():
    """Let half of the partitions have used up their quotas, as the meters would have found; nothing where no node stands."""
    if not (BASE / "state").is_dir():
        return
    standing = Standing("SOFTINST-1", "2026-11", 2000, {"2026-11": frozenset({"exceeded"})})
    names = sorted(path.name for path in (BASE / "instance").glob("slappart*"))
    QuotaBook(BASE / "state" / "quotas.json").save(dict.fromkeys(names[: (len(names) + 1) // 2], standing))


def damage():
    """What hands may have done meanwhile to a standing node; nothing where none stands."""
    if not (BASE / "instance" / "slappart0").is_dir():
        return
    passwd = Path("/etc/passwd")
    text = re.sub(
        r"^((?:slap|other)user0:.*):[^:]*:/bin/sh$",
        r"\1:/nowhere:/bin/false",
        passwd.read_text(),
        flags=re.MULTILINE,
    )
    passwd.write_text(text)
    home = BASE / "instance" / "slappart0"
    os.chown(home, 0, 0)
    home.chmod(0o777)
    (home / ".slapos-resource").unlink(missing_ok=True)
    ip("address flush dev br0 scope host")  # the private addresses


# --- supervisord without processes ------------------------------------------------------------------------------------


class StandInSupervisor(Supervisor):
    """What supervisord does as far as partitiond can tell, without a process: thousands of cases would each wait for one.

    What runs is kept in a file beside the node's directories, so that it outlives a partitiond that is killed, as
    supervisord does. A stunnel that it "starts" says in its log what stunnel would, and tincd what that does.
    """

    def __init__(self, config, points=None):
        super().__init__(config)
        self._points = points
        self._file = BASE / "supervisord.json"
        # the kernel's table of sockets, as it would be with what is "started" here
        tunnel_declarations.sock_diag = self

    @contextmanager
    def _as_another_process(self, label):
        """Each thing asked of supervisord is one point; what it does then is none of ours."""
        if self._points is None:
            yield
            return
        if label:
            self._points.reach(label)
        with self._points.not_counted():
            yield

    def start(self):
        with self._as_another_process("start supervisord"):
            assert not self._file.exists(), "a second supervisord"
            assert self.configuration.read_text() == self.render()
            self._save({})
            for name in self.group_names():
                self._add(name)

    def _call(self, method, *arguments):
        if method.startswith("partitiond."):  # it has no plug-in of ours
            raise PartitiondError("supervisor.fault", f"{method}: UNKNOWN_METHOD")
        if method == "system.multicall":  # each of them is one point
            return [self._call(one["methodName"], *one["params"]) for one in arguments[0]]
        method = method.removeprefix("supervisor.")
        reading = method in ("getState", "getPID", "getAllProcessInfo")
        with self._as_another_process("" if reading else f"supervisor.{method} {arguments}"):
            if not self._file.exists():
                raise PartitiondError("supervisor.down", "supervisord does not answer", retryable=True)
            name = re.sub("[A-Z]+", lambda capitals: "_" + capitals[0].lower(), method)
            return getattr(self, f"_{name}")(*arguments)

    def is_outdated(self):
        return False

    def _load(self):
        return json.loads(self._file.read_text())

    def _save(self, groups):
        self._file.write_text(json.dumps(groups, sort_keys=True))

    def _get_state(self):
        return {"statename": "RUNNING"}

    def _get_pid(self):
        return 4194303  # nobody's

    def _get_all_process_info(self):
        return [
            {"group": name, "name": "stunnel", "statename": "RUNNING", "pid": 4194302, "start": 1}
            for name in self._load()
        ]

    def _reload_config(self):
        files = {name: self.group_text(name) for name in self.group_names()}
        groups = self._load()
        changed = [name for name in files if name in groups and groups[name] != files[name]]
        return [[sorted(files.keys() - groups.keys()), changed, sorted(groups.keys() - files.keys())]]

    def _add_process_group(self, name):
        self._add(name)

    def _remove_process_group(self, name):
        self._save({key: text for key, text in self._load().items() if key != name})

    def _known(self, name):
        if name not in self._load():
            raise PartitiondError("supervisor.fault", f"BAD_NAME: {name}")
        return self._load()[name]

    def _start_process_group(self, name, _wait):
        self._reads(self._known(name))

    def _stop_process_group(self, name):
        self._known(name)

    def stop_groups(self, names):
        for name in names:  # each is a point
            try:
                self._call("supervisor.stopProcessGroup", name)
            except PartitiondError as error:
                if "BAD_NAME" not in str(error):
                    raise

    def _signal_process(self, process, _name):
        self._reads(self._known(process.partition(":")[0]))

    @staticmethod
    def handles_hang_up(_pid):
        return True

    def listeners(self, endpoints):
        """Who listens there: the user whose stunnel has read a configuration that says so."""
        groups = self._load().values() if self._file.exists() else ()
        read = [Path(_settings(text)["command"].split()[-1]) for text in groups]
        return {
            one: frozenset(
                file.stat().st_gid for file in read if file.exists() and listens(file.read_text(), one)
            )
            for one in endpoints
        }

    def _shutdown(self):
        self._file.unlink()

    def _add(self, name):
        self._save(self._load() | {name: self.group_text(name)})
        self._reads(self.group_text(name))

    def _reads(self, group):
        settings = _settings(group)
        if group.startswith(f"[group:{MESH}]\n"):
            with open(settings["stdout_logfile"], "a") as log:
                log.write(f"{tinc_status.READY}\n")
            return
        file = Path(settings["command"].split()[-1])
        said = [f"Reading configuration from file {file}"]
        said += [
            f"Service [{name}] (FD=9) bound to somewhere"
            for name in re.findall(r"^\[(.*)\]$", file.read_text(), re.MULTILINE)
        ]
        with open(settings["stdout_logfile"], "a") as log:
            log.writelines(f"2026.01.01 00:00:00 LOG5[ui]: {line}\n" for line in said)


def _settings(group):
    return dict(line.split("=", 1) for line in group.splitlines() if "=" in line)
