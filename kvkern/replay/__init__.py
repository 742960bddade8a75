"""Replays request traces through the production policies.

Read in this order: trace, drive, oracle, remote, two_tier, cells, report.
"""
