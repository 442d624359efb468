"""What `svdtune trace` is made of: running a module, repairs, probes, loading it from a file, the report."""
