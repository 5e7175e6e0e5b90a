"""Checks of ``ringattn verify``: every feature on this machine's kernels and ranks, against float64."""
