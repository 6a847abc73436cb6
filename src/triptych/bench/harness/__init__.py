"""Timing, machine description, reports and targets of benchmarks."""
