"""`kvkern doctor`: shows what on this host makes kvkern slow or keeps it from running, and the remedy. Needs no GPU.

facts.py gathers facts, findings.py judges them (a pure function), report.py prints. warm.py compiles ahead what a start
would compile.
"""
