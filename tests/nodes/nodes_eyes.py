"""What tests of several nodes look at: events, processes, who asked the master, and what is open."""

import json

LOG = "/var/log/partitiond"
STATE = "/var/lib/partitiond"


def events(node, *names):
    """What a node has recorded, of these names."""
    found = []
    path = node.seen(f"{LOG}/events.jsonl")
    for line in path.read_text().splitlines() if path.exists() else ():
        one = json.loads(line)
        if one["event"] in names:
            found.append(one)
    return found


def cases(node, *words):
    """The open cases of a node that have all these words."""
    found = node.verb("status")["node"]["open_cases"]
    return [case for case in found if all(word in case for word in words)]


def programs(node):
    """Everything that supervisord runs there: {(partition, process): pid}."""
    return {
        (name, one["name"]): one["pid"]
        for name, item in node.partitions().items()
        for one in item["processes"]
        if one["pid"]
    }


def buildouts(node, partition):
    """How often an instance's buildout was run there."""
    log = node.seen(f"{LOG}/{partition}/buildout.log")
    return log.read_text().count(f"configuring {partition}") if log.exists() else 0


def addresses(node):
    """What each partition has of the network, and may not lose."""
    return {name: (item["ipv4"], item["ipv6"], item["vpn_ipv4"]) for name, item in node.partitions().items()}


def at_master(world, computer):
    """The addresses that the master has of a computer's partitions."""
    found = {}
    for row in world.master.rows("partition_network"):
        if row["computer_reference"] == computer:
            found.setdefault(row["partition_reference"], set()).add(row["address"])
    return found


def asked(world, node, path):
    """How often a machine asked something of the master."""
    return world.master.asked(path).count(node.site.address)
