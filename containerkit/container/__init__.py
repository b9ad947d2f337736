"""Containers: create, start, exec, stop, logs, remove."""
