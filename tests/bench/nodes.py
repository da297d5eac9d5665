"""``make bench-nodes``: what several nodes cost: their master, each other, and one that is built again, in one run.

- **master**: requests per second of 10, 100 and 1000 simulated nodes beside slapos.core's, and what a real slapproxy with
  as many computers answers (``nodes_master.py``);
- **wire**: throughput and new connections between two nodes, raw, by stunnel over IPv6, by tinc, by stunnel over tinc: nodes,
  tunnels and mesh made by the product, ways by turns (``nodes_wire.py``);
- **mesh**: from the start of 3 or 10 tincds, and from the kill of one, until each has reached each (``nodes_mesh.py``);
- **rebuild**: a node with 20 instances, gone with its machine, and built again by ``partitiond run`` (``nodes_rebuild.py``).

Figures are medians with their range; ``ARGS="wire mesh --rounds 5"`` chooses.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # started with -P
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "partitiond"))
import node
import nodes_master
import nodes_mesh
import nodes_rebuild
import nodes_wire
import tunnel_load

from partitiond import sandbox

SECTIONS = ("master", "wire", "mesh", "rebuild")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of master and wire")
    parser.add_argument("--fleet", type=int, nargs="*", default=[10, 100, 1000], help="simulated nodes")
    parser.add_argument(
        "--computers", type=int, nargs="*", default=[10, 100], help="registered at a real slapproxy"
    )
    parser.add_argument("--partitions", type=int, default=10, help="busy ones of each such computer")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round of questions to slapproxy")
    parser.add_argument("--meshes", type=int, nargs="*", default=[3, 10], help="nodes of each mesh")
    parser.add_argument("--mesh-rounds", type=int, default=4)
    parser.add_argument("--instances", type=int, default=20, help="of the node that is rebuilt")
    parser.add_argument("--rebuilds", type=int, default=1, help="how often it is")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: no section; allowed: {', '.join(SECTIONS)}")
    sections = options.sections or SECTIONS
    node.ip("link", "set", "lo", "up")
    if "master" in sections:
        each = nodes_master.print_fleet(options.fleet)
        nodes_master.print_slapproxy(
            options.computers, options.partitions, each, options.rounds, options.seconds
        )
    if "wire" in sections:
        tunnel_load.compile_program()
        nodes_wire.print_ways(options.rounds)
    if "mesh" in sections:
        nodes_mesh.print_convergence(options.meshes, options.mesh_rounds)
    if "rebuild" in sections:
        nodes_rebuild.print_rebuild(options.instances, options.rebuilds)


if __name__ == "__main__":
    if os.geteuid() != 0 or not sandbox.inside():
        sys.exit("make bench-nodes runs this in private namespaces")
    main()
