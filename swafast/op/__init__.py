"""One update of tensors: checked, planned, assigned to backends and launched."""
