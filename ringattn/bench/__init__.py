"""Timings of ``ringattn bench`` on the user's machine."""
