"""Files to `VideoBatch`: packet index, readers, cutting by time, resizing, catalog, loader."""
