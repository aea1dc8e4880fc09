"""Datasets: one module each; base.py says what one is, order.py in which order its examples come."""
