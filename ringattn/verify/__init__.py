"""Every feature on this machine's kernels and ranks, held against float64: what ``ringattn verify`` runs."""
