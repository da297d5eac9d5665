"""The user database: one rewrite, ours changed, everybody else's lines kept byte for byte."""

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitiond import users
from partitiond.errors import PartitiondError
from partitiond.users import UserSpec

PASSWD = "root:x:0:0:root:/root:/bin/bash\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
GROUP = "root:x:0:\ndaemon:x:1:\nstaff:x:50:daemon\n"
SHADOW = "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n"
GSHADOW = "root:*::\ndaemon:*::\nstaff:!::daemon\n"


def partition(index, uid=None, base="/srv/i"):
    return UserSpec(
        f"slapuser{index}",
        5000 + index if uid is None else uid,
        f"{base}/slappart{index}",
        ("slapsoft",),
        f"slappart{index}",
    )


SOFTWARE = UserSpec("slapsoft", None, "/srv/s", (), None)
NODE = (SOFTWARE, *(partition(index) for index in range(3)))


@pytest.fixture
def etc(tmp_path):
    """Make a directory with the four files; texts given replace the plain ones."""

    def make(passwd=PASSWD, group=GROUP, shadow=SHADOW, gshadow=GSHADOW, name="etc"):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        for file, text, mode in (
            ("passwd", passwd, 0o644),
            ("group", group, 0o644),
            ("shadow", shadow, 0o640),
            ("gshadow", gshadow, 0o640),
        ):
            (directory / file).write_bytes(text if isinstance(text, bytes) else text.encode())
            (directory / file).chmod(mode)
        return directory

    return make


def converge(directory, desired=NODE):
    operations = users.plan(desired, users.observe(directory))
    users.apply(operations, directory)
    return operations


def lines(directory, name):
    return (directory / name).read_bytes().split(b"\n")


def test_users_are_made_once(etc):
    directory = etc()
    assert [one.id for one in converge(directory)] == [f"user/{spec.name}" for spec in NODE]
    assert users.plan(NODE, users.observe(directory)) == ()
    assert b"slapuser1:x:5001:5001:partitiond slappart1:/srv/i/slappart1:/bin/sh" in lines(
        directory, "passwd"
    )
    assert b"slapsoft:x:999:999:partitiond software:/srv/s:/bin/sh" in lines(directory, "passwd")
    assert b"slapsoft:x:999:slapuser0,slapuser1,slapuser2" in lines(directory, "group")
    assert b"slapsoft:!::slapuser0,slapuser1,slapuser2" in lines(directory, "gshadow")
    row = next(line for line in lines(directory, "shadow") if line.startswith(b"slapuser1:")).split(b":")
    assert row[1] == b"!"
    assert len(row) == 9
    assert stat.S_IMODE((directory / "shadow").stat().st_mode) == 0o640
    assert sorted(path.name for path in directory.iterdir()) == ["group", "gshadow", "passwd", "shadow"]


def test_the_second_time_nothing_is_written(etc):
    directory = etc()
    converge(directory)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} | {
        "inode": directory.stat().st_mtime_ns
    }
    assert converge(directory) == ()
    after = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} | {
        "inode": directory.stat().st_mtime_ns
    }
    assert before == after


def test_what_is_not_wanted_any_more_goes_and_nothing_else(etc):
    directory = etc()
    before = {name: (directory / name).read_bytes() for name in ("passwd", "group", "shadow", "gshadow")}
    converge(directory)
    operations = converge(directory, NODE[:2])
    assert [(one.id, one.action, one.partition) for one in operations] == [
        ("user/slapuser1", "remove", "slappart1"),
        ("user/slapuser2", "remove", "slappart2"),
    ]
    assert b"slapsoft:x:999:slapuser0" in lines(directory, "group")
    converge(directory, ())
    assert {name: (directory / name).read_bytes() for name in before} == before


DAMAGE = {
    "removed": ("passwd", None, "missing"),
    "shell": ("passwd", ("/bin/sh", "/bin/bash"), "shell is /bin/bash"),
    "home": ("passwd", ("/srv/i/slappart1:", "/root:"), "home is /root"),
    "mark": ("passwd", ("partitiond slappart1", "Somebody"), "not marked as ours"),
    "password": ("shadow", (":!:", ":$6$x$y:"), "has a password"),
    "password in passwd": ("passwd", (":x:", ":$6$x$y:"), "has a password"),
    "no password needed": ("shadow", (":!:", "::"), "has a password"),
    "group": ("group", None, "its group is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_repaired(etc, kind):
    directory = etc()
    converge(directory)
    file, change, reason = DAMAGE[kind]
    found = (directory / file).read_text().splitlines(keepends=True)
    changed = []
    for line in found:
        if line.startswith("slapuser1:"):
            if change is None:
                continue
            assert change[0] in line
            changed.append(line.replace(*change, 1))
        else:
            changed.append(line)
    (directory / file).write_text("".join(changed))
    (operation,) = users.plan(NODE, users.observe(directory))
    assert operation.id == "user/slapuser1"
    assert reason in operation.reason
    users.apply([operation], directory)
    assert users.plan(NODE, users.observe(directory)) == ()
    user = users.observe(directory).users["slapuser1"]
    assert (user.uid, user.gid, user.home, user.shell, user.locked) == (
        5001,
        5001,
        "/srv/i/slappart1",
        "/bin/sh",
        True,
    )


def test_membership_in_foreign_groups_is_taken_away_and_in_ours_given_back(etc):
    directory = etc()
    converge(directory)
    text = (directory / "group").read_text().replace("staff:x:50:daemon", "staff:x:50:daemon,slapuser0")
    (directory / "group").write_text(text.replace("slapuser0,slapuser1,slapuser2", "slapuser0,slapuser2"))
    reasons = {one.id: one.reason for one in converge(directory)}
    assert reasons == {
        "user/slapuser0": "is in foreign group staff",
        "user/slapuser1": "is not in group slapsoft",
    }
    assert b"staff:x:50:daemon" in lines(directory, "group")
    assert users.plan(NODE, users.observe(directory)) == ()


def test_an_existing_user_of_that_name_keeps_its_numbers(etc):
    directory = etc(
        passwd=PASSWD + "slapuser1:x:1234:1235:An old one:/home/old:/bin/bash\n",
        group=GROUP + "slapuser1:x:1235:\n",
        shadow=SHADOW + "slapuser1:$6$salt$hash:19000:0:99999:7:::\n",
    )
    numbers = users.observe(directory).numbers()["slapuser1"]
    desired = (SOFTWARE, partition(0), partition(1, uid=numbers[0]), partition(2))
    converge(directory, desired)
    user = users.observe(directory).users["slapuser1"]
    assert (user.uid, user.gid, user.ours, user.locked) == (1234, 1235, True, True)
    # locked, not forgotten: whoever wants the user back finds the hash
    assert any(line.startswith(b"slapuser1:!$6$salt$hash:") for line in lines(directory, "shadow"))


def test_a_group_that_was_left_behind_is_used_with_its_number(etc):
    directory = etc(group=GROUP + "slapuser1:x:777:\n")
    converge(directory)
    user = users.observe(directory).users["slapuser1"]
    assert (user.uid, user.gid) == (5001, 777)


@pytest.mark.parametrize(
    ("passwd", "group", "holder"),
    [
        ("other:x:5001:100::/:/bin/sh\n", "", "other"),
        ("", "others:x:5001:\n", "others"),
        ("slapuser1:x:1:1::/:/bin/sh\n", "", "daemon"),
    ],
)
def test_a_taken_number_is_refused_before_anything_is_changed(etc, passwd, group, holder):
    directory = etc(passwd=PASSWD + passwd, group=GROUP + group)
    with pytest.raises(PartitiondError) as caught:
        users.plan(NODE, users.observe(directory))
    assert caught.value.code == "users.uid_taken"
    assert holder in str(caught.value)
    assert "slapuser1" in caught.value.resource
    assert "uid_base" in caught.value.hint


def test_a_user_with_uid_0_is_refused(etc):
    directory = etc(passwd=PASSWD + "slapsoft:x:0:0::/root:/bin/sh\n")
    with pytest.raises(PartitiondError) as caught:
        users.plan(NODE, users.observe(directory))
    assert caught.value.code == "users.root"


def test_users_can_be_renamed_although_their_numbers_stay(etc):
    directory = etc()
    converge(directory)
    renamed = (
        SOFTWARE,
        *(UserSpec(f"part{i}", 5000 + i, f"/srv/i/slappart{i}", (), f"slappart{i}") for i in range(3)),
    )
    assert {one.action for one in converge(directory, renamed)} == {"create", "remove", "change"} - {"change"}
    assert {"part0", "part1", "part2"} <= set(users.observe(directory).users)
    assert users.plan(renamed, users.observe(directory)) == ()


@pytest.mark.parametrize("written", range(5))
@pytest.mark.parametrize("wanted", ["there", "gone"])
@pytest.mark.parametrize("way", ["there", "gone"])
def test_a_rewrite_that_was_cut_off_is_finished_or_taken_back(etc, way, wanted, written):
    """So many of the four files were written in the one direction, when the next command comes with either."""
    absent, present = etc(), etc(name="present")
    converge(present)
    before, after = (absent, present) if way == "there" else (present, absent)
    cut = etc(name="cut")
    order = users._CREATING if way == "there" else users._REMOVING
    for place, name in enumerate(order):
        (cut / name).write_bytes(((after if place < written else before) / name).read_bytes())
    seen = users.observe(cut)
    assert all(seen.users[name].ours for name in seen.users.keys() - {"root", "daemon"})
    converge(cut, NODE if wanted == "there" else ())
    for name in order:
        whole = present if wanted == "there" else absent
        assert sorted(lines(cut, name)) == sorted(lines(whole, name)), name


def test_of_two_lines_with_one_name_the_first_counts(etc):
    directory = etc(passwd=PASSWD + "twice:x:70:70::/a:/bin/sh\ntwice:x:71:71::/b:/bin/sh\n")
    assert users.observe(directory).users["twice"].uid == 70


def test_no_free_system_uid(etc):
    directory = etc(group=GROUP + "".join(f"g{gid}:x:{gid}:\n" for gid in range(100, 1000)))
    with pytest.raises(PartitiondError) as caught:
        converge(directory)
    assert caught.value.code == "users.no_uid"
    assert (directory / "passwd").read_text() == PASSWD


def test_two_hundred_users_are_one_rewrite(etc):
    directory = etc()
    desired = (SOFTWARE, *(partition(index) for index in range(200)))
    assert len(converge(directory, desired)) == 201
    assert converge(directory, desired) == ()


# what may stand in a foreign line: anything but the end of the line and NUL; no name of ours at its beginning
_BYTES = st.binary(max_size=40).map(lambda raw: raw.replace(b"\n", b"").replace(b"\0", b""))
_FIELDS = st.lists(_BYTES.map(lambda raw: raw.replace(b":", b"")), min_size=1, max_size=9).map(b":".join)
_FOREIGN = st.one_of(
    _BYTES,
    _FIELDS,
    st.sampled_from(
        (
            b"",
            b"+::::::",
            b"# a comment",
            b"odd:x:not-a-number:5:::",
            "u:x:70:70:\u2028 \x85 \x0c:/h:/bin/sh".encode(),
            b"v:x:71:71:CR:/h:/bin/sh\r",
            b"g:x:72:a,,b",
            b"short",
        )
    ),
).filter(lambda raw: not raw.startswith((b"slap", b"part")) and b"partitiond" not in raw)


@settings(max_examples=150, deadline=None)
@given(foreign=st.lists(_FOREIGN, max_size=6))
def test_foreign_lines_are_kept_byte_for_byte(tmp_path_factory, foreign):
    directory = tmp_path_factory.mktemp("etc")
    for name in ("passwd", "group", "shadow", "gshadow"):
        (directory / name).write_bytes(b"".join(line + b"\n" for line in foreign))
    try:
        converge(directory)
    except PartitiondError as error:
        assert error.code in ("users.uid_taken", "users.no_uid")  # noqa: PT017 - either this, or all of that
        kept = lines(directory, "passwd")
        assert kept == [*foreign, b""]
        return
    for name in ("passwd", "group", "shadow", "gshadow"):
        assert lines(directory, name)[: len(foreign)] == foreign
    assert converge(directory) == ()
    converge(directory, ())
    for name in ("passwd", "group", "shadow", "gshadow"):
        assert (directory / name).read_bytes() == b"".join(line + b"\n" for line in foreign)


def test_the_lock_of_the_system_is_given_back(etc):
    """lckpwdf(3), which useradd and passwd wait for."""
    import fcntl

    directory = etc()
    converge(directory)
    with open("/etc/.pwd.lock", "r+b") as file:
        # nobody holds it after us
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
