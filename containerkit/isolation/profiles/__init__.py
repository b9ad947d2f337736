"""Data: the default seccomp profile and the system call numbers that it is compiled with."""
