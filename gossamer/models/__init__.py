"""One decoder, one small file per model family, and the loaders."""
