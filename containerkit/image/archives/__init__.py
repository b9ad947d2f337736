"""Docker archives and OCI layouts, as directories and tars."""
