"""Timings that a user can make on their own machine: ``ringattn bench``."""
