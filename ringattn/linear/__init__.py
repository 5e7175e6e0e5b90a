"""Linear attention on one device: the state of a recurrence, computed in chunks of tokens by matrix products."""
