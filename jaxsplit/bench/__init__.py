"""Benchmarks: rates of devices and models, models with random weights, records of measurements."""
