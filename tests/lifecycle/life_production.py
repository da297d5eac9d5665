"""A node whose master is the strict production master: TLS, client certificates, microsecond timestamps, access status."""

import json
import time

from life_eyes import fetch
from life_node import BRIDGE, COMPUTER, CONFIGURATION, Node
from production_master import ProductionMaster


class ProductionNode(Node):
    """As ``Node``, with ``master`` in place of slapproxy and what stands before it."""

    def begin(self):
        self.base.mkdir(parents=True)
        self.bring_up_links()
        self.master = ProductionMaster(COMPUTER)
        text = CONFIGURATION.format(
            computer=COMPUTER,
            master=self.master.url,
            base=self.base,
            bridge=BRIDGE,
            partitions=self._partitions,
        )
        text += "".join(f"{key} = {value}\n" for key, value in self._settings.items())
        credentials = (
            f"[slapos]\nmaster_ca_file = {self.master.ca_file}\ncert_file = {self.master.cert_file}\n"
            f"key_file = {self.master.key_file}\ncertificate_repository_path = {self.base}/pairs\n"
            "instance_min_free_space = 1M\nsoftware_min_free_space = 1M\n"
        )
        self.configuration.write_text(text.replace("[slapos]\n", credentials, 1))

    def offer(self):
        self.wait(lambda: self.master.count("loadComputerConfigurationFromXML"), "the capacity to be posted")

    def forget_answers(self):
        self.master.clear()

    def _end_master(self):
        self.master.close()

    def partition(self, name):
        """As the daemon tells it, which takes no interpreter's start."""
        status, _, text = fetch(self, f"/1/partitions/{name}")
        assert status == 200, text
        value = json.loads(text)
        return value.get("partition", value)

    def let_time_pass(self, name):
        """Let the time be over for which a partition is kept."""
        path = self.base / "state" / "instances" / f"{name}.json"
        state = json.loads(path.read_text())
        assert state["keep_until"] > time.time()
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**state, "keep_until": 1.0}))
        new.replace(path)

    def words(self, subject):
        return self.master.words(subject)

    def told(self, subject, *words):
        """Wait until these words were the last that were told of a partition or release."""
        self.wait(lambda: self.words(subject)[-len(words) :] == list(words), f"{words} of {subject}")

    def mark(self, name, kind):
        """A file that slapgrid leaves in a partition; None without one."""
        path = self.base / "instance" / name / kind
        return path.read_text() if path.exists() else None

    def pair(self, name):
        """Certificate and key that the master gave for the instance in a partition."""
        pair = self.master.calls.pairs[self.master.books.in_partition(name).guid]
        return pair.certificate, pair.key
