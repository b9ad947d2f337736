"""Images: names, manifests, layers, the content store, snapshots."""
