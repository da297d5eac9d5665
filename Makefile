# Every target does its own set-up on a fresh Debian 12 or 13, as root. What it builds lies in .build/.
PYTHON ?= /usr/bin/python3
PREFIX ?= /opt/partitiond
B := .build
ENV := $(B)$(PREFIX)
RUN := $(ENV)/bin/python3 -I -m partitiond.sandbox --bind $(CURDIR):$(CURDIR) --
ARGS ?=
EXTRAS ?=
BENCHES := node packets tunnels accounting life supervisor promises polling nodes

.PHONY: help demo test test-full lint bench $(addprefix bench-,$(BENCHES)) install clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(if $(findstring --n,$(ARGS)),$(B)/tenants.stamp,$(B)/demo.stamp) ## the whole way through in private namespaces, with a real master (ARGS="--nodes 3 --mesh", --keep)
	$(ENV)/bin/python3 -I -m partitiond demo $(ARGS)

test: $(B)/test.stamp lint ## linters and tests, in private namespaces (ARGS are pytest's)
	tools/tests $(PREFIX) $(ENV) $(if $(ARGS),-m "not full" $(ARGS))

test-full: $(B)/test.stamp lint ## the whole matrices
	$(if $(ARGS),,MARKED="full or not full") tools/tests $(PREFIX) $(ENV) $(ARGS)

lint: $(B)/test.stamp ## ruff, mypy --strict, import-linter
	$(RUN) sh -ec 'cd $(CURDIR); PATH=$(PREFIX)/bin:$$PATH; ruff check .; ruff format --check .; mypy; lint-imports'

bench: $(B)/bench.stamp ## all that follows, one after the other; ARGS are given to one alone
	$(if $(ARGS),$(error ARGS are for one of them, such as make bench-node))
	$(foreach name,$(BENCHES),$(MAKE) bench-$(name) &&) true

bench-node: $(B)/bench.stamp ## what partitions cost, beside the floor and slapos.core, in private namespaces
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/node.py $(ARGS)

bench-packets: $(B)/bench.stamp ## what isolation costs a packet, beside no rules, in private namespaces
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/packets.py $(ARGS)

bench-tunnels: $(B)/bench.stamp ## what a tunnel costs, beside stunnel's defaults and haproxy, in private namespaces
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/tunnels.py $(ARGS)

bench-accounting: $(B)/bench.stamp ## what metering costs, beside nft and psutil, and how its ledger grows, in private namespaces
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/meters.py $(ARGS)

bench-supervisor: $(B)/bench.stamp ## hundreds of groups under one supervisord, beside one without our plug-in, in private namespaces
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/supervisor.py $(ARGS)

bench-promises: $(B)/bench.stamp ## what a pass over promises costs, beside slapgrid's own, in private namespaces
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/promises.py $(ARGS)

bench-life: $(B)/bench.stamp ## what instances cost, beside slapos.core, with slapproxy as master, in private namespaces
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/life.py $(ARGS)

bench-polling: $(B)/bench.stamp ## what a node asks of its master in a day, and how 10 000 of them spread, beside slapos.core's cron
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/polling.py $(ARGS)

bench-nodes: $(B)/bench.stamp ## several nodes: raw, stunnel, tinc, both; a mesh's convergence; a node rebuilt; the master's load
	$(RUN) $(PREFIX)/bin/python3 -P $(CURDIR)/tests/bench/nodes.py $(ARGS)

install: ## an environment at PREFIX that partition users can execute, with all that builds need offline (EXTRAS="iptables networkcache tenants")
	tools/environment --prefix $(PREFIX) --python $(PYTHON) --with master $(addprefix --with ,$(EXTRAS))

SOURCES := pyproject.toml setup.py tools/environment tools/guest $(wildcard requirements/*.txt) \
	$(shell find partitiond netplan stunnel_mgr accounting slap_client -type f ! -name '*.pyc')

$(B)/demo.stamp: $(SOURCES)
	tools/environment --prefix $(PREFIX) --python $(PYTHON) --below $(B) --with master
	touch $@

$(B)/tenants.stamp: $(SOURCES)
	tools/environment --prefix $(PREFIX) --python $(PYTHON) --below $(B) --with master --with tenants
	touch $@ $(B)/demo.stamp

$(B)/test.stamp: $(SOURCES)
	tools/environment --prefix $(PREFIX) --python $(PYTHON) --below $(B) --with master --with test
	touch $@ $(B)/tenants.stamp $(B)/demo.stamp

$(B)/bench.stamp: $(SOURCES)
	tools/environment --prefix $(PREFIX) --python $(PYTHON) --below $(B) --with master --with test --with bench
	touch $@ $(B)/test.stamp $(B)/tenants.stamp $(B)/demo.stamp

clean: ## remove what was built here
	rm -rf $(B)
