#!/bin/sh
# Make a machine the master, or a node. Run as root on Debian 12 or 13; a second run changes nothing, and says so.
#
#   provision.sh master --listen ADDRESS [--port PORT]
#   provision.sh node --computer ID --master URL [--partitions COUNT] [--mesh NETWORK --index NUMBER]
#   of both: (--interface NAME | --at IPV4) [--ipv6 ADDRESS/LENGTH [--on-link NETWORK]]
#            [--source DIRECTORY] [--prefix DIRECTORY] [--no-start] [--skip-install]
#
# --at finds the interface by an address that it has already, as its name hangs on the provider. --ipv6 is put on it at each
# boot; what is in --on-link is reached there without a router. --mesh makes a node of IPv4 alone, the NUMBER-th of the mesh.
# Without systemd, or with --no-start, nothing is started; all files are the same. --skip-install takes what is at the prefix.
set -eu

# the files of this script are read by others: partition users, DynamicUser=
umask 022
units=/etc/systemd/system
etc=/etc/opt/slapos
state=/var/lib/partitiond-provision # what was installed, and what services were started with
releases=/srv/releases

fail() { # STATUS CODE MESSAGE NEXT-STEP
    printf 'provision.sh: %s: %s\n  %s\n' "$2" "$3" "$4" >&2
    exit "$1"
}
usage() { # MESSAGE
    fail 64 provision.usage "$1" "the head of $0 says what it takes"
}
say() {
    printf 'provision.sh: %s\n' "$*"
}

# --- what is asked for ----------------------------------------------------------------------------------------------

[ $# -gt 0 ] || usage "a role is needed: master or node"
role=$1
shift
case $role in
    master | node) ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) usage "unknown role '$role': it is master or node" ;;
esac
listen= port=18080 computer= master= partitions=3 mesh= index= interface= at= ipv6= on_link=
source=$(cd "$(dirname "$0")/.." && pwd) prefix=/opt/partitiond start=yes install=yes
while [ $# -gt 0 ]; do
    case $1 in
        --no-start) start= ;;
        --skip-install) install= ;;
        --listen | --port | --computer | --master | --partitions | --mesh | --index | --interface | --at | --ipv6 | --on-link | \
            --source | --prefix)
            [ $# -gt 1 ] && [ -n "$2" ] || usage "$1 needs a value"
            case $2 in
                *[!]A-Za-z0-9./:_@%[-]*) usage "$1: '$2' has a character that no value here has" ;;
            esac
            name=$(echo "${1#--}" | tr - _)
            eval "$name=\$2" # the name is one of those above
            shift
            ;;
        *) usage "unknown option '$1'" ;;
    esac
    shift
done

needed() { # OPTION VALUE
    [ -n "$2" ] || usage "a $role needs --$1"
}
number() { # OPTION VALUE LEAST MOST
    case $2 in
        '' | *[!0-9]* | ??????*) usage "--$1: '$2' is no number from $3 to $4" ;;
    esac
    [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] || usage "--$1: $2 is not from $3 to $4"
}
alone() { # OPTION VALUE: what is for the other role
    [ -z "$2" ] || usage "--$1 is not for a $role"
}
case $role in
    master)
        needed listen "$listen"
        number port "$port" 1 65535
        alone computer "$computer"; alone master "$master"; alone mesh "$mesh"; alone index "$index"
        ;;
    node)
        needed computer "$computer"
        needed master "$master"
        number partitions "$partitions" 1 500
        alone listen "$listen"
        case $computer in
            *[!A-Za-z0-9_.-]*) usage "--computer: '$computer' has other characters than letters, digits and _ . -" ;;
        esac
        case $master in
            http://?* | https://?*) ;;
            *) usage "--master: '$master' is no URL of http or https" ;;
        esac
        case $mesh:$index in
            : | ?*:?*) ;;
            *) usage "--mesh and --index belong together" ;;
        esac
        [ -z "$index" ] || number index "$index" 0 1000
        [ -z "$mesh" ] || [ -z "$ipv6" ] || usage "a node of the mesh has no IPv6: --mesh or --ipv6"
        ;;
esac
case $interface:$at in
    ?*:?*) usage "--interface or --at, not both" ;;
    :) usage "a $role needs --interface or --at" ;;
esac
case $ipv6 in
    '') [ -z "$on_link" ] || usage "--on-link needs --ipv6" ;;
    *:*/*) number "ipv6 (its length)" "${ipv6##*/}" 1 128 ;;
    *) usage "--ipv6: '$ipv6' is no ADDRESS/LENGTH" ;;
esac
[ "$(id -u)" = 0 ] || fail 77 provision.root "packages, units and /etc are root's" "run it by sudo"
[ -f "$source/tools/environment" ] && [ -f "$source/Makefile" ] || fail 1 provision.source \
    "$source is no source tree of partitiond" "say by --source where it is"
case $prefix:$source in
    /*:/*) ;;
    *) usage "--prefix and --source are absolute paths" ;;
esac
systemd=
[ -z "$start" ] || [ ! -d /run/systemd/system ] || systemd=yes # sd_booted(3)

# --- the pieces -----------------------------------------------------------------------------------------------------

changes=0
changed() {
    changes=$((changes + 1))
    say "$*"
}
put() { # FILE: standard input becomes it, at once, unless it is it
    mkdir -p "$(dirname "$1")"
    new=$1.new.$$
    cat >"$new"
    if [ -f "$1" ] && [ ! -h "$1" ] && cmp -s "$new" "$1"; then
        rm -f "$new"
    else
        chmod 644 "$new"
        mv -f "$new" "$1"
        changed "wrote $1"
    fi
}

packages() { # PROGRAM=PACKAGE…: install those whose program is not there
    missing=
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null 2>&1 || missing="$missing ${pair#*=}"
    done
    [ -n "$missing" ] || return 0
    say "Debian packages:$missing"
    # their services are not ours: partitions run the programs
    policy=/usr/sbin/policy-rc.d made=
    # one of ours is what a killed run left
    if [ ! -e $policy ] || grep -qs vagrant/provision.sh $policy; then
        made=yes
        trap 'rm -f $policy' EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM HUP
        printf '#!/bin/sh\n# made by vagrant/provision.sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    apt-get update -qq
    # shellcheck disable=SC2086 # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    if [ -n "$made" ]; then
        rm -f $policy
        trap - EXIT INT TERM HUP
    fi
    hash -r
    changed "installed$missing"
}

environment() { # make install, once for each state of what it takes
    digest=$(
        cd "$source"
        find Makefile pyproject.toml setup.py README.md LICENSE requirements tools \
            partitiond netplan stunnel_mgr accounting slap_client -name __pycache__ -prune -o -type f -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-64
    )
    if [ "$(cat "$state/installed" 2>/dev/null)" = "$digest $prefix" ] && [ -x "$prefix/bin/partitiond" ]; then
        return 0
    fi
    say "make install PREFIX=$prefix (some minutes the first time)"
    make -C "$source" --no-print-directory install PREFIX="$prefix"
    # last, and at once: what was interrupted is begun again
    printf '%s\n' "$digest $prefix" >"$state/installed.new"
    mv "$state/installed.new" "$state/installed"
    changed "installed $prefix"
}

release() { # the Software Releases of the demonstration, at one place on all machines, as the master names them by it
    from=$("$prefix/bin/python3" -I -c 'import pathlib, partitiond.demo as d; print(pathlib.Path(d.__file__).parent)')
    for name in release services; do
        [ -d "$from/$name" ] || continue
        find "$from/$name" -type f ! -name '*.pyc' | LC_ALL=C sort | while IFS= read -r file; do
            cmp -s "$file" "$releases${file#"$from"}" || echo "${file#"$from"}"
        done >"$state/releases"
        while IFS= read -r file; do
            put "$releases$file" <"$from$file"
        done <"$state/releases"
        rm -f "$state/releases"
    done
}

check_addresses() { # with what there is of Python: a fresh Debian may have none before make install
    python=$(command -v python3 || true)
    [ ! -x "$prefix/bin/python3" ] || python=$prefix/bin/python3
    [ -n "$python" ] || return 0
    said=$("$python" -I -c 'import ipaddress, sys
for option, kind, value in zip(*[iter(sys.argv[1:])] * 3):
    if value:
        try:
            getattr(ipaddress, kind)(value)
        except ValueError as error:
            sys.exit(f"--{option}: {error}")' \
        listen ip_address "$listen" at IPv4Address "$at" ipv6 IPv6Interface "$ipv6" on-link IPv6Network "$on_link" \
        mesh IPv4Network "$mesh" 2>&1) || usage "$said"
}

find_interface() {
    [ -n "$at" ] || return 0
    interface=$(ip -o -4 address show to "$at/32" | awk 'NR == 1 { print $2 }')
    [ -n "$interface" ] || fail 1 provision.interface "no interface has the address $at" \
        "the provider gives it by config.vm.network; ip -4 address shows what is there"
}

network() { # the IPv6 of this machine, by a unit: which program keeps its network hangs on the box
    [ -n "$ipv6" ] || return 0
    put "$units/partitiond-address.service" <<UNIT
# written by vagrant/provision.sh
[Unit]
Description=IPv6 address of this machine in the private network
After=network-online.target
Wants=network-online.target
Before=partitiond.service slapproxy.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -ec 'ip link set $interface up; ip -6 address replace $ipv6 dev $interface nodad${on_link:+; ip -6 route replace $on_link dev $interface}'

[Install]
WantedBy=multi-user.target
UNIT
    service partitiond-address.service
}

service() { # UNIT [FILE…]: at each boot; started anew when it, or one of the files, is other than when it was started
    unit=$1
    shift
    wants=$units/multi-user.target.wants
    if [ "$(readlink "$wants/$unit" || true)" != "$units/$unit" ]; then
        mkdir -p "$wants"
        ln -sf "$units/$unit" "$wants/$unit"
        changed "$unit starts at boot"
    fi
    [ -n "$systemd" ] || return 0
    now=$(cat "$units/$unit" "$state/installed" "$@" 2>/dev/null | sha256sum)
    if systemctl -q is-active "$unit" && [ "$(cat "$state/$unit" 2>/dev/null)" = "$now" ]; then
        return 0
    fi
    systemctl daemon-reload
    systemctl restart "$unit" || fail 1 provision.service "$unit did not start" "journalctl -u $unit says why"
    printf '%s\n' "$now" >"$state/$unit"
    changed "started $unit"
}

# --- the roles ------------------------------------------------------------------------------------------------------

make_master() {
    host=$listen
    case $listen in *:*) host="[$listen]" ;; esac
    put $etc/slapproxy.cfg <<CONFIGURATION
# written by vagrant/provision.sh
[slapos]
computer_id = COMP-NONE
master_url = http://$host:$port/
software_root = /var/lib/slapproxy/software
instance_root = /var/lib/slapproxy/instance

[slapproxy]
host = $listen
port = $port
database_uri = /var/lib/slapproxy/proxy.db
CONFIGURATION
    put $etc/client.cfg <<CONFIGURATION
# written by vagrant/provision.sh: for slapos supply, request, remove
[slapos]
master_url = http://$host:$port/

[slapconsole]
CONFIGURATION
    put $units/slapproxy.service <<UNIT
# written by vagrant/provision.sh
[Unit]
Description=SlapOS master (slapos proxy)
After=network-online.target partitiond-address.service
Wants=network-online.target

[Service]
ExecStart=$prefix/master/bin/slapos proxy start --cfg $etc/slapproxy.cfg
DynamicUser=yes
StateDirectory=slapproxy
WorkingDirectory=/var/lib/slapproxy
Environment=HOME=/var/lib/slapproxy
Restart=always
RestartSec=2

[Install]
WantedBy=multi-user.target
UNIT
    service slapproxy.service $etc/slapproxy.cfg
}

make_node() {
    tinc=
    [ -z "$mesh" ] || tinc="
[tinc]
network = $mesh
index = $index"
    # no pipe ends in put: what it counts would be a subshell's
    put $etc/slapos.cfg <<CONFIGURATION
; written by vagrant/provision.sh; what is your own goes into $etc/slapos.cfg.d/*.cfg
[slapos]
computer_id = $computer
master_url = $master
software_root = /srv/slapgrid/software
instance_root = /srv/slapgrid/instance

[slapformat]
interface_name = $interface
partition_amount = $partitions
; VirtualBox has 10.0.2.0/24 for itself, which is in the usual 10.0.0.0/16
ipv4_local_network = 10.200.0.0/16
; there is no bridge, and nothing here has a guest
create_tap = false

[partitiond]
; all that the release needs came with make install
offline_builds = true
; who watches does not wait for five minutes
software_interval = 5
instances_interval = 5
$tinc
CONFIGURATION
    put $units/partitiond.service <<UNIT
$(sed "s:/opt/partitiond/:$prefix/:" "$source/tools/partitiond.service")
UNIT
    service partitiond.service $etc/slapos.cfg
}

check_addresses
mkdir -p "$state"
if [ -n "$install" ]; then
    set -- make=make ip=iproute2
    # the tenants of the scenario; memcached comes with make install
    [ "$role" = master ] || set -- "$@" mariadbd=mariadb-server-core mariadb=mariadb-client-core
    [ -z "$mesh" ] || set -- "$@" tincd=tinc
    packages "$@"
    environment
    check_addresses
elif [ ! -x "$prefix/bin/partitiond" ]; then
    fail 1 provision.prefix "$prefix/bin/partitiond is not there" "leave --skip-install out, or say by --prefix where it is"
fi
find_interface
release
network
"make_$role"
if [ $changes = 0 ]; then
    say "nothing changed: this machine is the $role already"
else
    say "$changes changes; this machine is the $role"
fi
[ -n "$systemd" ] || say "nothing was started: $([ -n "$start" ] && echo "there is no systemd" || echo "--no-start")"
