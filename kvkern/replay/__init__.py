"""Replays request traces through the production policies.

Read in this order: trace, policy_driver, oracle, remote_models, two_tier, grid, report, run.
"""
