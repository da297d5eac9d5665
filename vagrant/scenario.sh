#!/bin/sh
# The scenario on two nodes, from the operator's own machine: database and cache on node 1, an application on node 2.
#
#   scenario.sh [--through COMMAND]
#
# COMMAND is called as COMMAND MACHINE SHELL-COMMAND and runs it there as root, with standard input and output; without it that
# is ssh, as vagrant ssh-config says. A second run finds all there, and uses it once more. Exit status 0 only if all was seen.
set -eu

patience=600 # seconds, for each thing that is waited for: the releases are built on small machines
releases=/srv/releases
url=$releases/services/software.cfg
# fixed: the names of the Vagrantfile
database_node=COMP-1 application_node=COMP-2

through=
while [ $# -gt 0 ]; do
    case $1 in
        --through)
            [ $# -gt 1 ] || { echo "scenario.sh: --through needs a command" >&2; exit 64; }
            through=$2
            shift 2
            ;;
        *) echo "scenario.sh: unknown option $1; the head of $0 says what it takes" >&2; exit 64 ;;
    esac
done
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
if [ -z "$through" ]; then
    vagrant ssh-config >"$work/ssh" || { echo "scenario.sh: vagrant up comes first" >&2; exit 1; }
fi

on() { # MACHINE COMMAND
    if [ -n "$through" ]; then
        "$through" "$@"
    else
        quoted=$(printf '%s' "$2" | sed "s/'/'\\\\''/g")
        ssh -F "$work/ssh" "$1" "sudo sh -c '$quoted'"
    fi
}
say() {
    printf '%s\n' "$*"
}
wait_for() { # WHAT COMMAND…: until it succeeds; what it said last is told when it does not
    what=$1
    shift
    deadline=$(($(date +%s) + patience))
    until "$@" >"$work/said" 2>&1 </dev/null; do
        if [ "$(date +%s)" -ge "$deadline" ]; then
            echo "scenario.sh: waited $patience s for $what; said last:" >&2
            tail -n 20 "$work/said" >&2
            exit 1
        fi
        sleep 1 # another machine's doing: nothing here tells of it
    done
    say "✓ $what"
}

partitiond=/opt/partitiond/bin/partitiond
python="/opt/partitiond/bin/python3 -I"
slapos() {
    on master "/opt/partitiond/master/bin/slapos $* --cfg /etc/opt/slapos/client.cfg"
}

# --- the nodes ------------------------------------------------------------------------------------------------------

offered='import json, sys; sys.exit(not json.load(sys.stdin)["node"]["master"]["reachable"])'
for node in node1 node2; do
    wait_for "$node and the master know each other" on $node "$partitiond --json status | $python -c '$offered'"
done

# The operator carries the host blocks, as he has a trusted way to each machine already (ssh with the keys of Vagrant). They
# are no secret, but who may change them on their way is in the mesh: so they go neither through the private network nor the master.
if on node1 'grep -qx "\[tinc\]" /etc/opt/slapos/slapos.cfg' </dev/null; then
    for node in node1 node2; do
        on $node "$partitiond mesh export" </dev/null >"$work/$node.host"
    done
    on node1 "$partitiond mesh import -" <"$work/node2.host"
    on node2 "$partitiond mesh import -" <"$work/node1.host"
    joined='import json, sys; sys.exit(not all(one["reachable"] for one in json.load(sys.stdin)["peers"]))'
    for node in node1 node2; do
        wait_for "$node reaches its peer in the mesh" on $node "$partitiond --json mesh status | $python -c '$joined'"
    done
fi

# --- the services, by the stock client at the master ----------------------------------------------------------------

for computer in $database_node $application_node; do
    wait_for "$computer may have the release" slapos supply $url $computer
done
failed='import json, sys; sys.exit(all(one["state"] != "failed" for one in json.load(sys.stdin)["partitions"]))'
hurry() { # what found another not there yet is tried again now, and not after a pause
    for node in node1 node2; do
        if on $node "$partitiond --json status | $python -c '$failed'"; then
            on $node "$partitiond -q sync instances --force" || true # what still fails, the next look tells
        fi
    done
    return 1
}
request() { # succeeds when the application has published
    answer=$(slapos request application $url --type application --node computer_guid=$application_node \
        --parameters database-computer=$database_node cache-computer=$database_node 2>&1) || return
    say "$answer"
    case $answer in *"'url': "*) return 0 ;; esac
    hurry
}
wait_for "the application has found its database and its cache, for which it asked itself" request

up='
import json, sys
wanted, status = int(sys.argv[1]), json.load(sys.stdin)
held = [one for one in status["partitions"] if one["instance_guid"]]
print(*(one["id"] + ": " + one["state"] for one in held))
sys.exit(len(held) != wanted or any(one["state"] != "started" for one in held))
'
started() { # NODE INSTANCES
    on "$1" "$partitiond --json status | $python -c '$up' $2" || hurry
}
wait_for "database and cache are started on node 1" started node1 2
wait_for "the application is started on node 2" started node2 1

# --- what it does ---------------------------------------------------------------------------------------------------

# the page is at a private address, which its partition alone reaches: so a program asks as the partition's user
page='
import json, os, sys, time, urllib.parse, urllib.request
status, text = json.load(sys.stdin), "written at " + time.strftime("%F %T")
item = next(one for one in status["partitions"] for program in one["processes"] if program["name"].startswith("application"))
os.setgroups([]); os.setgid(item["user"]["uid"]); os.setuid(item["user"]["uid"])
url = "http://" + item["ipv4"] + ":8000/?text=" + urllib.parse.quote(text)
with urllib.request.urlopen(url, timeout=20) as answer:
    found = json.load(answer)
if found["rows"][-1] != text or found["cached"] != text:
    sys.exit("other texts came back: %r" % found)
print("%s: %d rows from %s, the last one and the value of the cache (%s) are: %s"
      % (item["id"], len(found["rows"]), found["row_server"], found["cache_server"], text))
'
wait_for "a text goes through the database and the cache of node 1 and comes back on node 2" \
    on node2 "$partitiond --json status | $python -c '$page'"
cat "$work/said"
where='
import json, sys
for one in json.load(sys.stdin)["partitions"]:
    if one["instance_guid"]:
        programs = [program["name"] + " " + program["state"].lower() for program in one["processes"]]
        print("  ", one["id"], one["ipv6"] or one["vpn_ipv4"], one["state"] + ":", ", ".join(programs))
'
for node in node1 node2; do
    say "$node:"
    on $node "$partitiond --json status | $python -c '$where'" </dev/null
done
say "All was seen to work. vagrant ssh node2, and there: sudo $partitiond status | tunnel list | usage"
