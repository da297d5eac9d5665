"""``metrics_listen`` of a running daemon."""

import json
import pwd
import socket
import subprocess
import urllib.request

from metrics_scene import free_port, get, listens, until
from prometheus_client.openmetrics.parser import text_string_to_metric_families


def test_the_daemon(bridge, node_config, command):
    """From its start: served, refused to tenants, followed when the configuration changes, told when the port is taken."""
    first, second = free_port(), free_port()
    node = node_config(2, partitiond={"metrics_listen": f"127.0.0.1:{first}", "meter_interval": 1})
    textfile = node.root / "partitiond.prom"
    node.write(accounting={"textfile": textfile})
    daemon = command.start("run", "-c", node.path)
    try:
        until(lambda: daemon.poll() is not None or listens("127.0.0.1", first), "the daemon to be up")
        url = f"http://127.0.0.1:{first}/metrics"

        def scraped():
            with urllib.request.urlopen(url, timeout=20) as answer:
                assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
                found = list(text_string_to_metric_families(answer.read().decode()))
            return {one.name for one in found}

        until(lambda: "partitiond_partition_network_receive_bytes" in scraped(), "a pass of the meters")
        assert {
            "partitiond_partition",
            "partitiond_node_memory_total_bytes",
        } <= scraped()
        uid = pwd.getpwnam("slapuser0").pw_uid
        assert get(uid, "127.0.0.1", first) == "ConnectionRefusedError"
        until(textfile.exists, "the textfile")
        assert command("plan", "-c", node.path).returncode == 0
        with socket.create_server(("127.0.0.1", second)):
            node.write(partitiond={"metrics_listen": f"127.0.0.1:{second}"})
            planned = json.loads(command("plan", "--json", "-c", node.path).stdout)["operations"]
            assert [one["resource"].split("/")[0] for one in planned] == ["filter"]
            assert command("apply", "-c", node.path).returncode == 0
            status = json.loads(command("status", "--json", "-c", node.path).stdout)["node"]
            assert any(f"nothing listens at 127.0.0.1:{second}" in one for one in status["open_cases"])
            assert not listens("127.0.0.1", first)
        node.write(partitiond={"metrics_listen": ""})
        assert command("apply", "-c", node.path).returncode == 0
        assert "metrics" not in nftables_text()
        status = json.loads(command("status", "--json", "-c", node.path).stdout)["node"]
        assert not any("metrics_listen" in one for one in status["open_cases"])
    finally:
        daemon.terminate()
        said = daemon.communicate(timeout=30)[1]
    assert daemon.returncode == 0, said
    assert not textfile.exists(), "what nobody writes anew tells old values"
    assert "Traceback" not in said


def nftables_text():
    line = ["/usr/sbin/nft", "list", "table", "inet", "partitiond"]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout
