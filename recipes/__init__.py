"""Recipes: their schema, their loader, and the data that ships with trimtab."""
