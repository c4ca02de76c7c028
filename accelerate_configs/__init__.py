"""One accelerate file a strategy, chosen by name: ``trimtab train RECIPE --accelerate zero3``."""
