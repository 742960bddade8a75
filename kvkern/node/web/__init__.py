"""HTTP inside the daemon: health and figures on one port, Prometheus' text and a page for people on another. Read-only."""
