"""`kvkern doctor`: what of this host kvkern will be slow on, or not run on at all, and the remedy. Works without a GPU.

facts.py gathers, findings.py judges (a pure function), report.py prints.
"""
