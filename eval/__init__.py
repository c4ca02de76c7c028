"""Evaluation: the arms, what is measured on their answers, intervals, verdict and report."""
