"""Tools for working on the package; they are not installed with it."""
