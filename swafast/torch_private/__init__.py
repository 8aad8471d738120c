"""Every use of names that are private in torch. If a release of torch changes one, a test fails with its name."""
