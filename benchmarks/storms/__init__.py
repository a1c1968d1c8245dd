"""A storm: thousands of users due at once, on real servers that may be killed; the parts of `benchmarks/storm.py`."""
