#!/bin/bash
# Gives this Mac its addresses in a ring of Thunderbolt cables. Run it on every Mac, with its own --rank.
#
# NOT YET RUN ON A MAC. The addresses and routes were tried on Linux; the macOS commands are from their manual pages.
# Without --apply it only prints what it would do.
#
#   launch/thunderbolt_ring.sh --rank 0 --size 3                       # look
#   launch/thunderbolt_ring.sh --rank 0 --size 3 --apply               # do it, with sudo
#
# Cable c joins rank c (its right port, 10.77.c.1) and rank c + 1 (its left port, 10.77.c.2), a subnet of four addresses
# for each cable; the last rank's right neighbour is rank 0. Two Macs have one cable, in the port --right of both.
# Each Mac is known to all others by one address, that of its right port (rank 1 of two: 10.77.0.2); routes lead there
# the shorter way round. A restart forgets everything but that Thunderbolt Bridge is off.

set -eu

usage="usage: thunderbolt_ring.sh --rank R --size N [--left en2] [--right en3] [--mtu M] [--apply]"

fail() {
    echo "Error: $1" >&2
    exit 2
}

number() { # name, value, least, most
    case "$2" in
        '' | *[!0-9]* | 0?* | ?????*) fail "$1: '$2', expected a number from $3 to $4" ;;
    esac
    if [ "$2" -lt "$3" ] || [ "$2" -gt "$4" ]; then
        fail "$1: $2, expected a number from $3 to $4"
    fi
}

interface() { # name, value
    case "$2" in
        '' | *[!a-z0-9]*) fail "$1: '$2', expected an interface such as en2 (networksetup -listallhardwareports)" ;;
    esac
}

rank='' size='' left=en2 right=en3 mtu='' apply=no
while [ $# -gt 0 ]; do
    case "$1" in
        --apply) apply=yes && shift && continue ;;
        -h | --help) echo "$usage" && exit 0 ;;
        --rank | --size | --left | --right | --mtu) [ $# -gt 1 ] || fail "$1: nothing, expected a value" ;;
        *) fail "'$1' is no option; $usage" ;;
    esac
    case "$1" in
        --rank) rank=$2 ;;
        --size) size=$2 ;;
        --left) left=$2 ;;
        --right) right=$2 ;;
        --mtu) mtu=$2 && number --mtu "$mtu" 1280 9000 ;;
    esac
    shift 2
done

number --size "$size" 2 8
number --rank "$rank" 0 $((size - 1))
interface --left "$left"
interface --right "$right"
if [ "$size" -gt 2 ] && [ "$left" = "$right" ]; then
    fail "--left and --right: both $left, expected the two ports with cables in them"
fi
if [ $apply = yes ] && [ "$(uname)" != Darwin ]; then
    fail "--apply: this is $(uname), expected macOS"
fi

run() {
    echo "sudo$(printf ' %q' "$@")"
    if [ $apply = yes ]; then sudo "$@"; fi
}

try() { # what may fail because it is so already
    echo "sudo$(printf ' %q' "$@") || true"
    if [ $apply = yes ]; then sudo "$@" || true; fi
}

cable() { # interface, this end's address
    try ifconfig bridge0 deletem "$1"
    run ifconfig "$1" inet "$2" netmask 255.255.255.252 up
    if [ -n "$mtu" ]; then run ifconfig "$1" mtu "$mtu"; fi
}

address() { # of a rank, the one that all others know
    if [ "$size" -eq 2 ]; then echo "10.77.0.$(($1 + 1))"; else echo "10.77.$1.1"; fi
}

routes() {
    if [ "$size" -gt 3 ]; then run sysctl -w net.inet.ip.forwarding=1; fi # others' bytes pass through here
    previous=$(((rank + size - 1) % size))
    for steps in $(seq 1 $((size - 2))); do # to the right; the last one, the left neighbour, is on our cable
        gateway=10.77.$rank.2
        if [ $((2 * steps)) -gt "$size" ]; then gateway=10.77.$previous.1; fi
        other=$(address $(((rank + steps) % size)))
        try route -n delete -host "$other"
        run route -n add -host "$other" "$gateway"
    done
}

try networksetup -setnetworkserviceenabled 'Thunderbolt Bridge' off
if [ "$size" -eq 2 ]; then
    cable "$right" "$(address "$rank")"
else
    cable "$right" "$(address "$rank")"
    cable "$left" "10.77.$(((rank + size - 1) % size)).2"
    routes
fi
echo "# rank $rank of $size is $(address "$rank")"
