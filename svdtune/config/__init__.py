"""What a person may choose: the schema, and the loader that turns YAML and overrides into it."""
