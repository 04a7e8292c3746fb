"""Passes on the loop: hoisting what does not change at every step, and the schedule of evaluations."""
