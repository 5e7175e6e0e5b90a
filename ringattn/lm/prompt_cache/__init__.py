"""Prompt caches on disk, written by all ranks and read by as many ranks or by another number of them.

`store` saves and loads a cache, `manifest` says which files belong to it, `atomic_files` writes them so that a reader
never sees half of a file, and `fingerprint` tells one model from another.
"""
