"""Entry scripts that accelerate launches, the trainers they use, and the stages before them."""
