"""Extensions of Sphinx for the site: what pages have from elsewhere in the repository, and how docstrings become pages."""
