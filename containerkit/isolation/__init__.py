"""Isolation: what a process may see and use, and how it comes to run there."""
