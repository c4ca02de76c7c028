"""Entry scripts that accelerate launches, the trainers they use, and where their rows come from."""
