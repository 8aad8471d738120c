"""The terms of everything above: rules and their weights, formats, names, layouts."""
