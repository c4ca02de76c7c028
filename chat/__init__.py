"""The live compass: a page on this machine where base, capped base and baked model answer side by side."""
