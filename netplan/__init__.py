"""partitiond, the node's network: addresses, links, routes, packet filter and its counters.

``desired`` (:class:`~netplan.model.DesiredNetwork`) and what :func:`~netplan.observe.observe` reads back from
the kernel go into :func:`~netplan.plan.plan`, a pure function whose operations :func:`~netplan.apply.apply`
carries out in batches.
"""
