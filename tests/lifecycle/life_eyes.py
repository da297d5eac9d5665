"""What a running daemon says of itself: its events, its metrics, how often it looked."""

import json
import time

from life_node import valid
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from partitiond.unix_http import UnixConnection


def fetch(node, target):
    """GET from the control socket: status, content type, body."""
    connection = UnixConnection(str(node.socket), 30)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type"), answer.read()
    finally:
        connection.close()


def metric(node, name, **labels):
    """The value of one sample; 0 when it is not there."""
    status, kind, text = fetch(node, "/metrics")
    assert (status, kind.partition(";")[0]) == (200, "application/openmetrics-text")
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels.items() >= labels.items():
                return sample.value
    return 0


def passes(node):
    """How often the converge lane looked."""
    return metric(node, "partitiond_lane_duration_seconds_count", lane="converge")


def events(node, *names):
    """What is recorded, in order; of these names only, when any are given."""
    status, _, text = fetch(node, "/1/events?limit=10000")
    assert status == 200
    found = [valid({"schema": "partitiond/event/1", **event}) for event in json.loads(text)["events"]]
    return [event for event in found if not names or event["event"] in names]


def settle(node):
    """Wait until the daemon looks no more; return how often it has looked by then."""
    before = passes(node)

    def quiet():
        nonlocal before
        time.sleep(0.6)
        last, before = before, passes(node)
        return before == last

    node.wait(quiet, "the daemon to come to rest", 20, pause=0)
    return before
