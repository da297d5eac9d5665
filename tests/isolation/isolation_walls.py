"""The jobs of the matrix that meet the walls of Unix and of namespaces: files, devices, sockets of ours, processes, memory.

With the walls off, root tries in the place of each attacker: what nothing stops has to work, else the attempt proves nothing.
"""

import grp
import os
import pwd
import signal
import socket
import stat

from isolation_cells import Job
from isolation_node import SECRET, VISITOR

KEY = 0x5EC0DE00
PINS = "/sys/fs/bpf/partitiond"
ABSTRACT = "abstract Unix sockets belong to the network namespace, which all share"
EXISTS = "that a process of some number is there, any user may ask by that number (sched_getaffinity(2))"
SESSION = "programs of one supervisord are one session, in which SIGCONT passes (kill(2)); it does nothing but resume"
OUTSIDE = "/proc of the machine shows every process to whoever is not in a partition's namespaces"


def _hands(scene, attacker):
    return scene.agent_name(attacker) if scene.enforced else "root"


def _pairs(scene):
    """Every attacker with every tenant that it is not."""
    for attacker in scene.attackers:
        for victim in scene.tenants:
            if victim.user != attacker:
                yield attacker, victim


def _job(scene, kind, attacker, victim, what, *words, **more):
    return Job(kind, attacker, victim.id if victim else "node", what, words, _hands(scene, attacker), **more)


def _job_of_user(scene, kind, attacker, victim, what, *words, **more):
    """One that the walls of Unix do not stop: the attacker does it itself also where ours are off."""
    return Job(kind, attacker, victim.id, what, words, scene.agent_name(attacker), **more)


# --- what owners lay out ------------------------------------------------------------------------------------------------------

# each attacker has its own, for what is tried with it changes it where nothing stops it
_FILES = (
    *("read", "write", "append", "truncate", "execute", "chmod", "chown", "utime", "setxattr", "set acl"),
    *("inotify", "fanotify", "by handle", "read as root"),
)
_WITH_HOME = ("hard link", "take away")
_SHARED = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")


def home(scene, attacker):
    """Where an attacker may put what it takes."""
    path = next((str(one.path) for one in scene.tenants if one.user == attacker), f"/srv/{VISITOR}")
    return path if scene.enforced else str(scene.node.root)


def belongings(scene):
    """What every tenant lays out for others to look for."""
    found = {}
    for one in scene.tenants:
        boxes = [f"{one.path}/var/for-{attacker}" for attacker in scene.attackers]
        names = [*_FILES, *_WITH_HOME, "delete", "rename"]
        found[one.id] = {
            "key": KEY + one.index,
            "name": f"matrix-{one.id}",
            "temporary": f"/tmp/dir-{one.id}",
            "directories": [*boxes, *(f"{box}/empty" for box in boxes), f"/tmp/dir-{one.id}"],
            "files": [
                *(f"{box}/{name}" for box in boxes for name in names),
                *(f"{where}/matrix-{one.id}" for where in _SHARED),
                f"/tmp/dir-{one.id}/inner",
            ],
            "sockets": [f"/tmp/socket-{one.id}", f"{one.path}/var/socket", f"\0matrix-{one.id}"],
        }
    return found


def lay_out(scene):
    """Let every tenant lay it out, by its own process; return what it says of it."""
    return scene.ask_all({name: ("own", what) for name, what in belongings(scene).items()})


def take_up(scene):
    """Let every tenant take it up again."""
    scene.ask_all({name: ("disown", what) for name, what in belongings(scene).items()})


# --- files and directories ----------------------------------------------------------------------------------------------------


def directories(scene):
    for attacker, victim in _with_own(scene):
        own = {"allowed": victim.user == attacker}
        for where in (str(victim.path), f"{victim.path}/etc", f"{victim.path}/var/for-{attacker}"):
            name = os.path.relpath(where, victim.path).replace(f"for-{attacker}", "open to all")
            mounts = () if name == "etc" else ("overlay", "bind mount")
            for verb in ("list", "enter", "inotify", "fanotify", *mounts):
                yield _job(scene, "directories", attacker, victim, f"{verb} {name}", verb, where, **own)
            for verb in ("create", "mkdir", "mkfifo", "bind a socket", "symlink"):
                target = f"{where}/{verb}-{attacker}"
                yield _job(scene, "directories", attacker, victim, f"{verb} in {name}", verb, target, **own)
        box = f"{victim.path}/var/for-{attacker}"
        yield _job(scene, "directories", attacker, victim, "rmdir", "rmdir", f"{box}/empty", **own)
        yield _job(scene, "directories", attacker, victim, "look inside", "look inside", f"{box}/read", **own)


def files(scene):
    for attacker, victim in _with_own(scene):
        own = {"allowed": victim.user == attacker}
        box = f"{victim.path}/var/for-{attacker}"
        for verb in _FILES:
            # only root hands a file to somebody else, and handles past directories are root's too
            may = own["allowed"] and verb != "by handle"
            yield _job(scene, "files", attacker, victim, verb, verb, f"{box}/{verb}", allowed=may)
        for verb in _WITH_HOME:
            words = (verb, f"{box}/{verb}", home(scene, attacker))
            yield _job(scene, "files", attacker, victim, verb, *words, **own)
        yield _job(
            scene, "files", attacker, victim, "rename", "rename", f"{box}/rename", f"{box}/renamed", **own
        )
        yield _job(scene, "files", attacker, victim, "delete", "delete", f"{box}/delete", **own)
        yield _job(
            scene,
            "files",
            attacker,
            victim,
            "connect a socket",
            "connect",
            f"{victim.path}/var/socket",
            **own,
        )
        for name in (".slapos-resource", "buildout.cfg", "etc/secret", "etc/run/agent", "etc/tunnel/db.cfg"):
            yield _job(
                scene, "files", attacker, victim, f"read {name}", "read", f"{victim.path}/{name}", **own
            )
            if victim.user != attacker:
                yield _job(
                    scene, "files", attacker, victim, f"write {name}", "write", f"{victim.path}/{name}"
                )


def _with_own(scene):
    for attacker in scene.attackers:
        for victim in scene.tenants:
            yield attacker, victim


# --- what root keeps ----------------------------------------------------------------------------------------------------------


def _owner(scene, path):
    """The tenant that a path of ours is about, or None."""
    parts = {part.split(".")[0].removesuffix("-tunnel") for part in path.split("/")}
    return next((one for one in scene.tenants if one.id in parts), None)


def kept_paths(scene):
    """Everything that the product keeps of partitions and of itself, but for the partitions' own directories."""
    root = scene.node.root
    for place in ("state", "log", "run", "software", "instance/etc", "instance/var"):
        for where, below, names in os.walk(root / place):
            yield place, where, "directory"
            for name in names:
                path = os.path.join(where, name)
                yield place, path, "socket" if stat.S_ISSOCK(os.lstat(path).st_mode) else "file"
            below.sort()
    for where, _, names in os.walk(PINS):  # links and maps of the programs that hold addresses
        yield "bpf", where, "directory"
        for name in names:
            yield "bpf", os.path.join(where, name), "pin"
    yield "instance", str(root / "instance"), "directory"
    yield "instance", str(root / "instance" / "sv.sock"), "socket"


_KEPT = {
    "state": "state, keys",
    "log": "logs",
    "run": "run directory",
    "software": "software",
    "bpf": "pins of programs",
}


def kept(scene):
    """Reading and writing what root keeps.  Its own log and key a user reads, and releases are there to be read."""
    for place, path, what in list(kept_paths(scene)):
        owner = _owner(scene, path)
        kind = _KEPT.get(place, "supervisord's files")
        for attacker in scene.attackers:
            name = os.path.relpath(path, scene.node.root) if place != "bpf" else os.path.basename(path)
            if owner:
                name = name.replace(owner.id, "PARTITION")
            mine = owner is not None and owner.user == attacker
            for verb, target in _kept_attempts(place, path, what, attacker, mine=mine):
                yield _job(scene, kind, attacker, owner, f"{verb} {name}", verb, target)
        if what == "pin":
            yield Job(kind, "root", "node", "open pin", ("open pin", path), "root", allowed=True)


def _kept_attempts(place, path, what, attacker, *, mine):
    if what == "socket":
        if (
            os.path.basename(path) != "control.sock"
        ):  # that is open to all: what it answers is tried by sockets()
            yield "connect", path
        return
    if what == "pin":
        yield "open pin", path
        yield "chmod", path
        return
    if what == "file":
        yield "write", path
        if not mine:
            yield "chmod" if place != "software" else "append", path
        if not mine and place != "software":
            yield "read", path
        return
    yield "mkdir" if place == "bpf" else "create", f"{path}/new-{attacker}"
    if place in ("state", "bpf") and not mine:
        yield "list", path


def sockets(scene):
    """The control socket: the verbs, and what it says of others."""
    control = str(scene.control)
    for attacker, victim in _pairs(scene):
        for target in (f"/1/partitions/{victim.id}", "/1/status", "/1/events", "/1/usage", "/metrics"):
            words = ("ask", control, "GET", target, "", victim.id)
            yield _job(
                scene, "control socket", attacker, victim, f"GET {target.replace(victim.id, 'ID')}", *words
            )
        if not scene.enforced and victim is not scene.tenants[-1]:
            continue  # each is a whole pass of the daemon
        body = f'{{"partitions": ["{victim.id}-none"]}}'
        yield _job(
            scene,
            "control socket",
            attacker,
            victim,
            "POST /1/apply",
            "ask",
            control,
            "POST",
            "/1/apply",
            body,
            "",
        )
    for attacker in scene.attackers:
        path = str(scene.node.root / "instance" / "sv.sock")
        yield _job(scene, "supervisord's socket", attacker, None, "connect", "connect", path)


# --- devices ------------------------------------------------------------------------------------------------------------------

_TAP, _TUN, _QUEUES, _PERSISTENT = 2, 1, 0x100, 0x800


def devices(scene):
    for attacker, victim in _with_own(scene):
        own = {"allowed": victim.user == attacker}
        path, rdev = str(victim.device), os.stat(victim.device).st_rdev
        for verb in ("read device", "write device", "ioctl device"):
            yield _job(scene, "block devices", attacker, victim, verb, verb, path, **own)
        yield _job(
            scene,
            "block devices",
            attacker,
            victim,
            "mknod again",
            "mknod again",
            path,
            home(scene, attacker),
            rdev,
        )
        tap, tun = victim.network.tap.name, victim.network.tun.name
        yield _job(scene, "taps and tuns", attacker, victim, "attach the tap", "attach", tap, _TAP, **own)
        yield _job(scene, "taps and tuns", attacker, victim, "attach the tun", "attach", tun, _TUN, **own)
        if not own["allowed"]:
            yield _job(scene, "block devices", attacker, victim, "chmod", "chmod", path)
            yield _job(scene, "block devices", attacker, victim, "set acl", "set acl", path)
        for what, words in {
            "new tap of that kind": ("attach", f"{tap}x{attacker[-1]}", _TAP),
            # what they are already: where root may do it, nothing shall change
            "set its flags": ("set link", tap, 0x8914, "0110"),
            "set its MAC": ("set link", tap, 0x8924, "0100" + victim.network.tap.mac.replace(":", "")),
            "set its MTU": ("set link", tap, 0x8922, "dc050000"),
            "capture its frames": ("raw socket", socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
        }.items():
            yield _job(scene, "taps and tuns", attacker, victim, what, *words)


# --- processes ----------------------------------------------------------------------------------------------------------------

_SEEN = (
    ("seen",),
    *(
        ("proc read", name)
        for name in ("cmdline", "status", "stat", "statm", "comm", "cgroup", "limits", "sched")
    ),
    ("proc list", "task"),
    ("proc read", "oom_score"),
    ("proc read", "mountinfo"),
)
_TRACED = (
    *(
        ("proc read", name)
        for name in ("environ", "maps", "smaps", "mem", "io", "stack", "auxv", "syscall", "pagemap")
    ),
    *(("proc read", name) for name in ("personality", "numa_maps")),
    *(("proc list", name) for name in ("fd", "fdinfo", "ns", "map_files")),
    *(("proc link", name) for name in ("exe", "cwd", "root", "ns/mnt", "ns/ipc")),
    *(
        ("proc write", name)
        for name in ("oom_score_adj", "comm", "clear_refs", "mem", "coredump_filter", "timerslack_ns")
    ),
    ("through root", "/etc"),
    ("through cwd",),
    ("standing files",),
    ("ptrace", 16),
    ("ptrace", 0x4206),
    *(
        (verb,)
        for verb in ("read memory", "take descriptor", "robust list", "madvise", "move pages", "kcmp", "perf")
    ),
    ("join process", 0x20000),
    ("join process", 0x8000000),
)
_SIGNALLED = (
    *(("kill", int(number)) for number in (0, signal.SIGUSR1, signal.SIGCONT)),
    *((verb,) for verb in ("sigqueue", "kill by descriptor", "renice", "affinity", "scheduler", "ioprio")),
)


def processes(scene):
    for kind, attacker, agent, victim in _watchers(scene):
        outside = kind.endswith("outside") or attacker == VISITOR
        pid = scene.agents[victim.id].pid
        for verb, *more in _SEEN:
            known = OUTSIDE if outside else ""
            by = agent if outside else scene.agent_name(attacker)
            what = " ".join((verb, *map(str, more)))
            words = (verb, pid, *more)
            yield Job(f"/proc{kind}", attacker, victim.id, what, words, by, known=known)
        for verb, *more in (*_TRACED, *_SIGNALLED):
            what = " ".join((verb, *map(str, more)))
            what = " ".join((verb, *map(str, more)))
            row = "signals, priorities" if (verb, *more) in _SIGNALLED else "/proc, ptrace"
            known = SESSION if (verb, *more) == ("kill", int(signal.SIGCONT)) and not outside else ""
            yield Job(f"{row}{kind}", attacker, victim.id, what, (verb, pid, *more), agent, known=known)
        for how in ("getsid", "affinity", "pidfd"):
            yield Job(f"/proc{kind}", attacker, victim.id, how, ("there", how, pid), agent, known=EXISTS)
        words = ("renice user", victim.uid)
        yield Job(f"signals, priorities{kind}", attacker, victim.id, "renice user", words, agent)


def _watchers(scene):
    """Attackers as the product starts them, and the same users outside of it (a login, a job of cron)."""
    for attacker, victim in _pairs(scene):
        yield "", attacker, _hands(scene, attacker), victim
        if attacker != VISITOR and scene.enforced:
            yield ", from outside", attacker, attacker.replace("slapuser", "outside"), victim


def own_processes(scene):
    """What works with a process of one's own."""
    for one in scene.tenants:
        pid = scene.agents[one.id].pid
        for verb, *more in (
            ("seen",),
            ("proc read", "environ"),
            ("proc list", "fd"),
            ("kill", int(signal.SIGUSR1)),
        ):
            yield Job("own processes", one.user, one.id, verb, (verb, pid, *more), one.id, allowed=True)


def shared(scene, told):
    """What processes of a machine share, unless they have their own."""
    for attacker, victim in _pairs(scene):
        key, name = KEY + victim.index, f"matrix-{victim.id}"
        for what, words in {
            "shm": ("shm", key),
            "shm by number": ("shm by number", told[victim.id]["shm"], name),
            "msg": ("msg", key),
            "sem": ("sem", key),
            "list of shm": ("sysvipc", "shm", key),
            "list of msg": ("sysvipc", "msg", key),
            "list of sem": ("sysvipc", "sem", key),
            "POSIX queue": ("mqueue", name),
        }.items():
            yield _job_of_user(scene, "IPC", attacker, victim, what, *words)
        yield _job_of_user(
            scene, "abstract sockets", attacker, victim, "connect", "abstract", name, known=ABSTRACT
        )
        # never shared, whatever is switched off: there the owner shows that it can be found
        hands = scene.agent_name(attacker) if scene.enforced else victim.id
        yield Job("session keyring", attacker, victim.id, "search", ("key", name), hands)
        for where in _SHARED:
            yield _job_of_user(
                scene, "shared directories", attacker, victim, f"named in {where}", "named", where, name
            )
            for verb in ("look inside", "read", "write", "truncate", "inotify"):
                path = f"{where}/{name}"
                yield _job_of_user(
                    scene, "shared directories", attacker, victim, f"{verb} {where}/…", verb, path
                )
        for verb, path in (
            *(("list", f"/tmp/dir-{victim.id}"), ("read", f"/tmp/dir-{victim.id}/inner")),
            ("write", f"/tmp/dir-{victim.id}/inner"),
            ("connect", f"/tmp/socket-{victim.id}"),
        ):
            yield _job_of_user(scene, "shared directories", attacker, victim, f"{verb} in /tmp", verb, path)


def own_shared(scene, told):
    """The owner finds all of it, also from another process of the same partition."""
    for one in scene.tenants:
        name = f"matrix-{one.id}"
        for words in (
            *(
                ("shm", KEY + one.index),
                ("shm by number", told[one.id]["shm"], name),
                ("msg", KEY + one.index),
            ),
            *(("sem", KEY + one.index), ("mqueue", name), ("connect", f"/tmp/socket-{one.id}")),
            *(("read", f"{where}/{name}") for where in _SHARED),
        ):
            yield Job(
                "own memory, queues",
                one.user,
                one.id,
                " ".join(map(str, words[:2])),
                words,
                one.id,
                allowed=True,
            )


def namespaces(scene):
    """Ways around: a user namespace of one's own, what the launcher may have left open, the namespaces of others."""
    pins = [path for _, path, what in kept_paths(scene) if "namespaces" in path and what == "file"]
    for attacker, victim in _pairs(scene):
        if attacker == VISITOR:
            continue
        pid, name = scene.agents[victim.id].pid, f"matrix-{victim.id}"
        for covered, probe in (("/proc", f"/proc/{pid}"), *((where, f"{where}/{name}") for where in _SHARED)):
            yield _job_of_user(
                scene, "namespaces", attacker, victim, f"uncover {covered}", "uncover", covered, probe
            )
        yield _job(scene, "namespaces", attacker, victim, "mount proc", "mount proc", f"/proc/{pid}")
        for path in pins:
            if _owner(scene, path) is victim:
                for kind in (0x20000, 0x8000000):
                    what = f"join {os.path.basename(path)} as {kind:#x}"
                    yield _job_of_user(scene, "namespaces", attacker, victim, what, "join", path, kind)
    for attacker in scene.attackers[:-1]:
        agent = scene.agent_name(attacker)
        groups = [pwd.getpwnam(attacker).pw_gid, grp.getgrnam("slapsoft").gr_gid]
        for verb, *words in (
            *(("inherited",), ("privileged",), ("new privileges",)),
            *(("knows", SECRET), ("belongs", groups)),
        ):
            # nobody has these of himself, but the third: they are the launcher's to leave, and root shows that they are seen
            hands = agent if scene.enforced or verb == "new privileges" else "root"
            yield Job("left by the launcher", attacker, "node", verb, (verb, *words), hands)


def privileges(scene):
    """What only root may do with the network that all share."""
    for attacker in scene.attackers:
        for family, kind, protocol in (
            (socket.AF_INET, socket.SOCK_RAW, 1),
            (socket.AF_INET, socket.SOCK_RAW, 255),
            (socket.AF_INET6, socket.SOCK_RAW, 58),
            (socket.AF_INET6, socket.SOCK_RAW, 17),
            (socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
            (socket.AF_PACKET, socket.SOCK_DGRAM, 0),
        ):
            words = (int(family), int(kind), protocol)
            what = f"raw socket {words}"
            yield _job(scene, "network privileges", attacker, None, what, "raw socket", *words)
            what = f"as root of a user namespace {words}"
            yield _job(scene, "network privileges", attacker, None, what, "privileged socket", *words)
        for six, option in ((False, 19), (True, 75), (False, 36)):
            what = f"socket option {option}"
            yield _job(scene, "network privileges", attacker, None, what, "privileged option", six, option)
        for what, words in {
            "add an address": (0, 20, 0x600, "02200000" + "01000000" + "08000200" + "7f000009"),
            "read the packet filter": (12, 0xA01, 0x300, "01000000"),
        }.items():
            yield _job(scene, "network privileges", attacker, None, what, "netlink", *words)
