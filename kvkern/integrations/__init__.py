"""Adapters that plug kvkern into inference engines. Each engine imports its adapter; kvkern itself imports none."""
