"""Tools for developing the package. They are not installed with it."""
