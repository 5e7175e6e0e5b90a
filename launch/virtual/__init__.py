"""A cluster on one Linux machine: hosts are network namespaces, cables are throttled links, memory is a cgroup's.

    sudo python -m launch.virtual --hosts 4 --rate 1gbit --memory 2G -- \\
        sh -c 'ringattn launch --hosts $RINGATTN_HOSTS -- python train.py'

The command runs where it can reach every host, and `ssh ADDRESS COMMAND` brings it there: a stand-in that comes first
on PATH. Under `ringattn launch` ranks talk over TCP through the provider that MPICH has on a Mac; without it MPICH has
to be told so (MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp). It needs root, and iproute2's `ip` and `tc`.
What it does not have: another kernel, another disk, and the time of a cable's own electronics.
"""

from .cluster import Cluster, clean, unavailable

__all__ = ["Cluster", "clean", "unavailable"]
