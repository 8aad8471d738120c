"""Names of planes that code without torch needs too."""

#: The plane of the variance, and the head of those of the columns: ``deviation.<column>``.
VARIANCE, DEVIATION = "variance", "deviation"
