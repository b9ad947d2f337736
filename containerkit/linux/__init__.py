"""The kernel's system calls, one thin function each, named as the kernel names them.

The only ``ctypes`` in the tree.
"""
