"""Replays request traces through the production policies. Read in this order: trace, drive, two_tier, oracle, cells, report."""
