"""The networks: where they come from (folder, hub id, `tiny`, fake), what they are, and which parameters learn."""
