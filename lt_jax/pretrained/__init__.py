"""Weights to begin with: published ones, and those of runs of ours."""
