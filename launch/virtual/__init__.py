"""Virtual cluster on one Linux machine, of network namespaces as hosts, throttled links and cgroups with less memory.

    sudo python -m launch.virtual --hosts 4 --rate 1gbit --memory 2G -- \\
        sh -c 'ringattn launch --hosts $RINGATTN_HOSTS -- python train.py'

The command runs on this machine, from which it can reach every host. A replacement of ssh comes first on PATH:
`ssh ADDRESS COMMAND` runs a command on a host. Under `ringattn launch`, ranks communicate over TCP through the provider
that MPICH has on a Mac; other launchers need MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp. The cluster needs root, and `ip`
and `tc` of iproute2. Its hosts share one kernel and one disk, and its cables have no latency of their own.
"""

from .cluster import Cluster, clean, unavailable

__all__ = ["Cluster", "clean", "unavailable"]
