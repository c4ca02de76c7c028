"""The measures, one file each: what it asks, its arithmetic, and what the report says of it."""
