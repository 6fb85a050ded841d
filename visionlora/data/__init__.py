"""Images on disk: decoding, folders, splits, transforms, datasets and their examination."""
