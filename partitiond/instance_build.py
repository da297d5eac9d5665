"""Instances: the release's template with the sections that slapgrid appends, and buildout run on it as the partition's user.

``offline = true``, as slapgrid has it; and no index, which a published zc.buildout would ask all the same.
"""

from __future__ import annotations

import os
import pwd
import time
from typing import TYPE_CHECKING

from accounting.model import iso_utc
from partitiond import (
    build_server,
    buildout,
    certificates,
    execute,
    files,
    instance_bootstrap,
    privacy,
)
from partitiond.errors import PartitiondError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from partitiond.context import Context
    from partitiond.node import Partition
    from slap_client.documents import PartitionDocument

LONG_SECONDS = 900.0
_LOG_LIMIT = 5 * 1024 * 1024


def instance_profile(context: Context, partition: Partition, entry: PartitionDocument) -> bytes:
    """The ``buildout.cfg`` of an instance: the release's template and the sections of slapgrid."""
    config = context.config
    url = entry.software_release or ""
    key, certificate = certificates.paths(context.config, partition) or ("", "")
    directory = buildout.software_directory(config, url)
    shared = _lines(config.shared_part_list)
    appended = f"""

# appended as slapgrid does
[buildout]
bin-directory = ${{buildout:directory}}/sbin
offline = true
index = {buildout.NO_INDEX}

[slap-connection]
computer-id = {config.computer_id}
partition-id = {partition.id}
server-url = {config.master_url}
software-release-url = {url}
key-file = {key}
cert-file = {certificate}
shared-part-list =
{shared}
build-time-part-list =
{_lines(config.software.build_time_part_list)}
requested-state = {entry.requested_state}

[slap_connection]
computer_id = {config.computer_id}
partition_id = {partition.id}
server_url = {config.master_url}
software_release_url = {url}
key_file = {key}
cert_file = {certificate}

[storage-configuration]
storage-home = {config.instance_storage_home or ""}

[network-information]
global-ipv4-network = {config.grid.ipv4_global_network}
"""
    owner = pwd.getpwnam(config.software_user).pw_uid
    with files.directory(config.software_root, directory.name) as descriptor:
        for name in ("instance.cfg", "template.cfg"):
            try:
                # a link of the software user's to somebody's secret would be handed to the tenant
                profile = files.read(name, dir_fd=descriptor, limit=buildout.PROFILE_LIMIT, reader=owner)
                return profile + appended.encode()
            except FileNotFoundError:
                continue
    raise PartitiondError(
        "instance.no_profile",
        "the software release has neither instance.cfg nor template.cfg",
        resource=partition.id,
        hint=f"look into {directory}",
    )


def _lines(value: str) -> str:
    """Entries one a line: recipes divide these options by lines."""
    return "\n".join(f"  {line.strip()}" for line in value.splitlines() if line.strip())


def configure_instance(context: Context, partition: Partition, entry: PartitionDocument) -> None:
    """Write an instance's profile and run buildout on it as its user.

    Raises PartitiondError ``instance.build`` with the end of the log, ``instance.no_profile``, or OSError.
    """
    config = context.config
    directory = buildout.software_directory(config, entry.software_release or "")
    profile = instance_profile(context, partition, entry)
    with files.directory(partition.path) as descriptor:
        files.write("buildout.cfg", profile, dir_fd=descriptor, mode=0o640, owner=(0, partition.gid))
        _link_software(descriptor, directory)
    env = execute.environment(str(partition.path), partition.user)
    env["SLAPGRID_INSTANCE_ROOT"] = str(config.instance_root)
    path = config.log_dir / partition.id / "buildout.log"
    context.building[partition.id] = time.time()
    try:
        with buildout.Log(path, f"configuring {partition.id}", _LOG_LIMIT) as log:
            outcome = _build(context, partition, directory, env, log)
    finally:
        context.building.pop(partition.id, None)
    if not outcome.ok:
        raise buildout.build_error("instance.build", partition.id, outcome, path)


def trouble(context: Context) -> str:
    """Which instance keeps the others waiting; empty where none does."""
    late = [
        f"{name} has been configuring since {iso_utc(since)}"
        for name, since in list(context.building.items())
        if time.time() - since > LONG_SECONDS
    ]
    if not late:
        return ""
    return f"{', '.join(late)}: the instances after it wait; partition_timeout would end it"


def _build(
    context: Context, partition: Partition, directory: Path, env: Mapping[str, str], log: int
) -> execute.Outcome:
    """Run the release's buildout, or have it done by the server of builds, which comes to the same.

    Where it is to be bootstrapped first, that is done each time, as slapgrid does.
    """
    config = context.config
    record = buildout.session_record(config, partition.id)
    timeout = config.grid.partition_timeout
    bootstrap = instance_bootstrap.command(config, partition, directory)
    if not bootstrap and build_server.fits(config, directory):
        pinned = privacy.directory(config), partition.id
        wanted = build_server.Build(
            directory,
            partition.user,
            partition.path,
            env,
            pinned if privacy.is_private(config, partition) else None,
        )
        outcome = context.builds.build(wanted, log=log, stop=context.stop, timeout=timeout, record=record)
        if outcome is not None:
            return outcome

    def run(command: list[str]) -> execute.Outcome:
        return execute.as_user(
            partition.user,
            partition.user,
            command,
            cwd=partition.path,
            env=env,
            log=log,
            stop=context.stop,
            timeout=timeout,
            record=record,
            enter=privacy.entry(config, partition),
        )

    if not bootstrap:
        return run([str(directory / "bin" / "buildout"), "-U"])
    outcome = run(bootstrap)
    return run([str(partition.path / "sbin" / "buildout"), "-U"]) if outcome.ok else outcome


def _link_software(descriptor: int, directory: Path) -> None:
    name = "software_release"
    try:
        if os.readlink(name, dir_fd=descriptor) == str(directory):
            return
    except OSError:
        pass  # no link yet, or something else in its place
    files.link(name, directory, dir_fd=descriptor)
