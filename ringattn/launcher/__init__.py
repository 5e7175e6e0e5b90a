"""Hosts and launching: the work around the ranks, outside their programs.

`hostfile` reads the hosts and `preflight` checks them. `mpiexec` finds the installed MPI's mpiexec and writes its
command line. `supervisor` runs it, with a `rank_table` of the reports of every rank's `rank_wrapper`.
"""
