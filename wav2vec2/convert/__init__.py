"""Checkpoints of other programs: read into this toolkit's terms, and written back."""
