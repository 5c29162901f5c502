"""The command line: one file per command, and the only room that wires the others together.

A command's file imports only what describes its options; what does the work is imported when it runs.
"""
