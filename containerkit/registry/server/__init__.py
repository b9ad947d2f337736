"""A real Distribution v2 registry in pure Python: :func:`~containerkit.registry.server.server.serve`."""
