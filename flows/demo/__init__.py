"""The zero-set-up run: a small world of its own, then the factory's whole main job on it."""
