"""What the strict master knows: software that is wanted, partitions, instances; and the documents made of it.

Production's forms: int timestamps in microseconds, guids SOFTINST-n, an access status and the SLA beside each
instance, routable addresses as 5-tuples, partitions in no order, nothing but its name in a free one.
"""

import hashlib
import time
from dataclasses import dataclass, field

from master_wire import Thing, instance_xml

STATES = ("started", "stopped", "destroyed")


@dataclass
class Slave:
    """A shared instance."""

    guid: str
    title: str
    parameters: dict
    timestamp: int
    connection: dict = field(default_factory=dict)
    requested_by: str = ""


@dataclass
class Instance:
    """A Software Instance; ``partition`` is None while it waits for one."""

    guid: str
    release: str
    title: str
    partition: str | None = None
    state: str = "started"
    software_type: str = "RootSoftwareInstance"
    parameters: dict = field(default_factory=dict)
    filter: dict = field(default_factory=dict)
    access_status: str | None = None
    timestamp: int = 0
    connection: dict = field(default_factory=dict)
    slaves: list = field(default_factory=list)
    root_title: str = ""
    requested_by: str = ""
    asked: int = 0  # how often it was requested before it had a partition


@dataclass
class Place:
    """A Compute Partition: its addresses as the node offered them."""

    ip_list: list = field(default_factory=list)
    full_ip_list: list = field(default_factory=list)


@dataclass
class Books:
    """One computer of the master."""

    computer: str
    software: dict = field(default_factory=dict)  # url: available | destroyed
    software_status: dict = field(default_factory=dict)
    places: dict = field(default_factory=dict)
    instances: dict = field(default_factory=dict)  # guid: Instance
    offered: dict | None = None
    number: int = 0
    last_stamp: int = 0

    def stamp(self):
        """Give another timestamp, always a later one."""
        self.last_stamp = max(self.last_stamp + 1, time.time_ns() // 1000)
        return self.last_stamp

    def new_guid(self):
        self.number += 1
        return f"SOFTINST-{self.number}"

    def in_partition(self, name):
        """Give the instance in a partition, or None."""
        return next((one for one in self.instances.values() if one.partition == name), None)

    def free_places(self):
        busy = {one.partition for one in self.instances.values()}
        return sorted(set(self.places) - busy, key=lambda name: (len(name), name))

    def tree(self, instance):
        """All instances of the tree of requests of which ``instance`` is one."""
        root = instance.root_title
        return [one for one in self.instances.values() if one.root_title == root]

    # --- documents

    def computer_document(self, only=None):
        """What getFullComputerInformation gives; with ``only`` a partition's name to the instance in it."""
        names = [only] if only else sorted(self.places, key=lambda name: hashlib.md5(name.encode()).digest())  # noqa: S324
        state = {
            "_computer_id": self.computer,
            "_computer_partition_list": [self.partition_document(name) for name in names],
        }
        if only is None:
            state["_software_release_list"] = [
                self._release(url, {"_requested_state": wanted}) for url, wanted in self.software.items()
            ]
        return Thing("Computer", (self.computer,), state)

    def _release(self, url, more=None):
        state = {"_computer_guid": self.computer, "_software_instance_list": [], "_software_release": url}
        return Thing("SoftwareRelease", (url, self.computer), {**state, **(more or {})})

    def partition_document(self, name, **more):
        instance = self.in_partition(name)
        state = {
            "_computer_id": self.computer,
            "_need_modification": int(instance is not None),
            "_partition_id": name,
            "_request_dict": None,
            "_requested_state": "destroyed",
            "_software_release_document": None,
            **more,
        }
        if instance is not None:
            state |= {
                "_connection_dict": instance.connection,
                "_filter_dict": instance.filter,
                "_instance_guid": instance.guid,
                "_parameter_dict": self._parameters(instance),
                "_requested_state": instance.state,
                "_software_release_document": self._release(instance.release),
            }
            if instance.access_status is not None:
                state["_access_status"] = instance.access_status
        return Thing("ComputerPartition", (self.computer, name, None), state)

    def _parameters(self, instance):
        place = self.places[instance.partition]
        slaves = [
            {
                "slave_title": one.title,
                "slave_reference": one.guid,
                "slap_software_type": instance.software_type,
                "timestamp": one.timestamp,
                **one.parameters,
            }
            for one in instance.slaves
        ]
        return {
            **instance.parameters,
            "full_ip_list": place.full_ip_list,
            "instance_title": instance.title,
            "ip_list": place.ip_list,
            "root_instance_short_title": "",
            "root_instance_title": instance.root_title,
            "slap_computer_id": self.computer,
            "slap_computer_partition_id": instance.partition,
            "slap_software_release_url": instance.release,
            "slap_software_type": instance.software_type,
            "slave_instance_list": slaves,
            "timestamp": instance.timestamp,
        }

    def request_document(self, instance, url):
        """What requestComputerPartition gives for an instance that has its partition."""
        state = {
            "_connection_dict": instance.connection,
            "_instance_guid": instance.guid,
            "_parameter_dict": {**instance.parameters, "timestamp": instance.timestamp},
            "_requested_state": instance.state,
            "connection_xml": instance_xml(instance.connection),
            **self._where(instance, url),
        }
        return Thing("SoftwareInstance", (), state)

    def shared_document(self, slave, host, url):
        """What requestComputerPartition gives for a shared instance."""
        state = {
            "_connection_dict": slave.connection,
            "_parameter_dict": {**slave.parameters, "timestamp": slave.timestamp},
            **self._where(host, url),
        }
        return Thing("SoftwareInstance", (), state)

    def _where(self, instance, url):
        return {
            "ip_list": self.places[instance.partition].ip_list,
            "slap_computer_id": self.computer,
            "slap_computer_partition_id": instance.partition,
            "slap_server_url": url,
            "slap_software_release_url": instance.release,
            "slap_software_type": instance.software_type,
        }
