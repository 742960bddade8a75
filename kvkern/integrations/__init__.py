"""Adapters that plug kvkern into inference engines. Each is imported by its engine, never by kvkern itself."""
