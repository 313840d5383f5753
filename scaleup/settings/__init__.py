"""Settings of a run: schema, loading, and rules that need no files."""
