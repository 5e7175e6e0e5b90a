"""Hosts and launching: everything that happens around the ranks, none of it inside them.

`mpiexec` finds and describes the launcher of the installed MPI, `local` runs a program with it on this machine, and
`rank` is the small process that every rank runs under.
"""
