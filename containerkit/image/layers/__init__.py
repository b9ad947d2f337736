"""Layers: their tars, and the trees that they are unpacked to and made of."""
