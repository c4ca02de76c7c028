"""A run: its folder and records, the tuned weights that it evaluates, and the axis and floor stages."""
