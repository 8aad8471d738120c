"""Names of torch that are not public API. Tests fail with the name when a release of torch changes one."""
