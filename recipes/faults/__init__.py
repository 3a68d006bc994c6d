"""Faults on purpose: programs that fail in every way and place, judged by how all their processes end."""
