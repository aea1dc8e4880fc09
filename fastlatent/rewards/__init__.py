"""Reward functions: one module each. Importing them never imports torch, so a reward worker starts at once."""
